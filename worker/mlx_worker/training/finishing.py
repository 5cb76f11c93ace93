"""That a finished run is not lost: room and output folder are checked before the first update, and at the end the
worker keeps its state in memory until the disk takes the last checkpoint and the export."""

import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_supervisor import wire
from mlx_worker.checkpoint import durable_files, training_state
from mlx_worker.checkpoint.manifest import describe, step_of
from mlx_worker.checkpoint.saver import CHECKPOINT_BOUND_S, Saver
from mlx_worker.checkpoint.store import RESERVE_BYTES, CheckpointStore, DiskError, disk_nearly_full, needed_for
from mlx_worker.errors import RefusedError
from mlx_worker.extras.extras import Extras
from mlx_worker.supervision.hang_watchdog import HangWatchdog
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.task import Task
from mlx_worker.training.commands import Commands

WAIT_LIMIT_S = 24 * 3600.0
"""After this long without room the worker gives up: the run fails and is not restarted."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Between two attempts; the pause doubles from the first to the longest."""
GRACE_SHARE = 0.5
"""Of the grace period: how long a stop waits for the disk. The rest is for the last attempt."""
HEARTBEAT_S = 5.0
POLL_S = 0.1
TRAINER_BYTES = 1024 * 1024
"""Room for `trainer.json` and the manifest."""
STOP_WAITS = "it is in memory; a stop waits at most half of restart.stop_grace_s for it"
_MLX_DISK_ERROR = re.compile(r"\[\w+\] (?:Unable to write|Failed to open file) ")


class SaveError(RuntimeError):
    """The last checkpoint could not be written, so the run is not complete."""


def unwritable(folder: Path) -> str:
    """Why the folder, which is made, cannot be written, and what helps; "" if it can."""
    try:
        durable_files.try_folder(folder)
    except OSError as error:
        reason = "it is not a folder" if folder.is_file() else describe(error)
        return f"cannot write to {folder}: {reason}; choose a folder that can be written"
    return ""


class Patience:
    """How long one wait for the disk may last, by the stop requests so far and those to come.

    Without a request, or after one that waits: without limit. After a request, or the supervisor's death: a part of the
    grace period. A request during the wait ends it at once: who made it knows of the wait.
    """

    def __init__(self, stop: StopFlag, grace_s: float) -> None:
        self._stop, self._limit_s = stop, GRACE_SHARE * grace_s
        self._begun_s = time.monotonic()
        self._at_once = not stop.requested or stop.waits
        self._requested_s: float | None = None

    @property
    def seconds(self) -> float:
        """Since the wait began."""
        return time.monotonic() - self._begun_s

    def ends(self) -> bool:
        """Whether the wait is over."""
        if not self._stop.requested or self._stop.waits:
            return False
        if self._at_once and not self._stop.orphaned:
            return True
        self._requested_s = self.seconds if self._requested_s is None else self._requested_s
        return self.seconds - self._requested_s > self._limit_s


class Finishing:
    """Saves and exports the state after the last update. Use it on the training thread."""

    def __init__(
        self,
        job: wire.Job,
        task: Task,
        store: CheckpointStore,
        saver: Saver,
        commands: Commands,
        watchdog: HangWatchdog,
        extras: Extras,
    ) -> None:
        self._extras = extras
        self._job, self._task, self._store, self._saver = job, task, store, saver
        self._link, self._stop, self._commands, self._watchdog = commands.link, commands.stop, commands, watchdog
        self._folder = task.export_dir or Path(job.run_dir) / "export"
        allowed_s = job.grace_s if job.hang_timeout_s is None else min(job.grace_s, job.hang_timeout_s)
        self._heartbeat_s = min(HEARTBEAT_S, allowed_s / 4)
        self._export_error = self._waiting_for = self._subject = ""
        self._task_failed = False
        self.exported = ""
        """The folder with the result, once it is there."""
        self._reported_s = float("-inf")
        self.while_waiting: Callable[[], object] = lambda: None
        """Called before each attempt: other files on the disk may be written again, too."""

    # Before the first update

    def check(self, *, resumed: bool) -> list[str]:
        """What would keep the run from saving or exporting, a sentence each; makes the output folder.

        Raises RefusedError if nothing is trained yet. A run that has made progress continues with a note: the disk may
        have room when it is needed.
        """
        unwritable = list(self._folder_problems())  # makes the folder, whose disk is then checked
        problems = [*self._room_problems(), *unwritable]
        if problems and not resumed:
            raise RefusedError(problems[0])
        return [*problems, *self._keep_problems()]

    def _folder_problems(self) -> Iterator[str]:
        if self._task.export is None:
            return
        if problem := unwritable(self._folder):
            yield f"{self._export_key()}: {problem}"

    def _room_problems(self) -> Iterator[str]:
        checkpoint_bytes, export_bytes = self._checkpoint_bytes() + RESERVE_BYTES, self._export_bytes()
        try:
            free_bytes = self._store.free_bytes()
            export_free_bytes = shutil.disk_usage(self._folder).free if export_bytes else 0
            together = export_bytes > 0 and self._folder.stat().st_dev == self._store.folder.stat().st_dev
        except (DiskError, OSError):  # a missing folder is reported as such
            return
        what, needed_bytes = "a checkpoint", checkpoint_bytes
        if together:
            what, needed_bytes = "a checkpoint and the export", checkpoint_bytes + export_bytes
        if free_bytes < needed_bytes:
            full = disk_nearly_full(free_bytes, needed_bytes, f"for {what}", reserve_bytes=RESERVE_BYTES)
            yield f"{full}: free space on the disk of {self._store.folder}, or choose another folder (--state-dir)"
        if export_bytes and not together and export_free_bytes < export_bytes:
            full = disk_nearly_full(export_free_bytes, export_bytes, "for the export", reserve_bytes=0)
            yield f"{full}: free space on the disk of {self._folder}, or choose another folder ({self._export_key()})"

    def _keep_problems(self) -> Iterator[str]:
        """Whether the disk has room for as many checkpoints as the settings keep.

        The newest stays until the next is durable, so even `keep = 1` needs room for two.
        """
        keep = max(self._job.checkpoint.keep, 2) + self._job.checkpoint.keep_best
        each_bytes = self._checkpoint_bytes()
        try:
            existing = sum(step_of(path.name) is not None for path in self._store.folder.iterdir())
            room_bytes = self._store.free_bytes() - RESERVE_BYTES - self._export_bytes()
        except (DiskError, OSError):
            return
        fit = existing + max(room_bytes, 0) // each_bytes
        if fit < keep:
            yield (
                f"the disk of {self._store.folder} has room for {fit} checkpoints of {each_bytes / 2**20:,.0f} MiB, "
                f"checkpoint.keep = {self._job.checkpoint.keep} needs {keep}: free "
                f"{(keep - fit) * each_bytes / 2**20:,.0f} MiB, or lower checkpoint.keep"
            )

    def _checkpoint_bytes(self) -> int:
        arrays = training_state.trained_arrays(self._task), training_state.optimizer_arrays(self._task)
        return needed_for(*arrays, *self._extras.state().arrays.values()) + TRAINER_BYTES

    def _export_bytes(self) -> int:
        return 0 if self._task.export is None else self._task.export_bytes

    def _export_key(self) -> str:
        """Where the output folder is set."""
        task = self._job.task
        if task.kind == "mlx_lm":
            if "adapter_path" in task.options or not task.config:
                return task.options_from.get("adapter_path", "--adapter-path")
            return f"{os.path.normpath(Path(task.base_dir) / Path(task.config or '').expanduser())}: adapter_path"
        return "the run's folder" if self._task.export_dir is None else "Task.export_dir"

    # After the last update

    def deliver(self, step: int, *, saved: bool) -> str:
        """Wait until the last checkpoint is durable (`saved`: it is already) and the result is exported.

        Where only the disk of the checkpoint is full, the result is exported first. Returns "", or after a stop request
        what is missing. Raises RefusedError after `WAIT_LIMIT_S`, SaveError if no waiting would help, and errors of the
        task's own export.
        """
        self._require_retryable(saved)
        patience = Patience(self._stop, self._job.grace_s)
        exported, pause_s = self._export(saved), FIRST_PAUSE_S
        waited = not (saved and exported)
        while not (saved and exported):
            lost = self.lost(step, saved=saved)
            if patience.ends():
                return lost
            if patience.seconds > WAIT_LIMIT_S:
                raise RefusedError(f"gave up after {WAIT_LIMIT_S / 3600:.3g} hours of waiting; {lost}")
            self._report_wait(step, saved, exported)
            self._pause(pause_s, patience)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not saved:
                saved = self._saver.retry()
                self._require_retryable(saved)
            if not exported and (saved or not self._task_failed):
                exported = self._export(saved)
        if waited:
            self._end_wait(step)
        return ""

    def save_before_exit(self, step: int, *, saved: bool) -> str:
        """After a stop before the last step: wait until its checkpoint is durable, as long as the stop allows.

        Returns "", or what is lost.
        """
        patience, pause_s, waited = Patience(self._stop, self._job.grace_s), FIRST_PAUSE_S, not saved
        while not saved:
            if not self._saver.can_retry or patience.ends() or patience.seconds > WAIT_LIMIT_S:
                return self.lost(step, saved=False)
            self._report_wait(step, saved, exported=False)
            self._pause(pause_s, patience)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            saved = self._saver.retry()
        if waited:
            self._end_wait(step)
        return ""

    def _end_wait(self, step: int) -> None:
        self._link.phase("train")
        print(f"the wait is over: step {step} is saved")

    def _require_retryable(self, saved: bool) -> None:
        if not saved and not self._saver.can_retry:
            raise SaveError(f"the final checkpoint failed: {self._saver.error}")

    def _export(self, saved: bool) -> bool:
        """Whether the result is exported now. An error of the task's own is raised only once the checkpoint is safe."""
        if self._task.export is None:
            return True
        self._watchdog.arm(CHECKPOINT_BOUND_S)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._extras.average.in_model():
                self._task.export(self._folder)
        except Exception as error:
            self._export_error = self._disk_problem(error)
            if self._export_error:
                return False
            if saved:
                raise
            traceback.print_exception(error)
            self._export_error, self._task_failed = f"{type(error).__name__}: {error}", True
            return False
        self.exported = os.fsencode(self._folder.absolute()).decode("utf-8", "replace")
        print(f"exported to {self._folder}")
        return True

    def _disk_problem(self, error: Exception) -> str:
        """Why waiting may help: the disk is full or fails, or the output folder can't be written. "" if it would not.

        MLX reports a full disk as RuntimeError. Other errors in a folder that can be written are the task's own.
        """
        if isinstance(error, OSError) and error.errno in wire.DISK_ERRORS:
            return describe(error)
        of_mlx = isinstance(error, RuntimeError) and _MLX_DISK_ERROR.match(str(error)) is not None
        if not (of_mlx or isinstance(error, OSError)):
            return ""
        try:
            durable_files.try_folder(self._folder)
        except OSError as problem:
            return describe(problem)
        return str(error) if of_mlx else ""

    def lost(self, step: int, *, saved: bool) -> str:
        """What is lost if the worker ends now."""
        if saved:
            return f"not exported ({self._export_error}): the next start exports step {step} without training"
        first = self._saver.saved_step + 1
        steps = f"step {step}" if first == step else f"steps {first} to {step}"
        return f"step {step} not saved ({self._saver.error}): the next start trains {steps} again"

    def _report_wait(self, step: int, saved: bool, exported: bool) -> None:
        """Set what the heartbeats report; print it when it changes."""
        if saved:
            text = f"{self._folder} to export the result ({self._export_error}); "
            text += f"step {step} is saved, a stop loses nothing"
        else:
            text = f"the disk of {self._store.folder} to save step {step} ({self._saver.error}); "
            text += "it is in memory, a stop loses it" if not self._stop.requested or self._stop.waits else STOP_WAITS
            if exported and self._task.export is not None:
                text += f"; the result is already in {self._folder}"
        subject = "export" if saved else "checkpoint"
        if subject != self._subject:
            if self._subject:
                self._link.phase("checkpoint")  # the wait for the checkpoint is over, another one begins
            print(f"waiting for {text}", file=sys.stderr)
            self._subject, self._reported_s = subject, float("-inf")
        self._waiting_for = text

    def _pause(self, seconds: float, patience: "Patience") -> None:
        """Sleep, report that the worker lives, and answer commands; a stop request may end it early."""
        end_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < end_s and not patience.ends():
            if now_s - self._reported_s >= self._heartbeat_s:
                self._reported_s = now_s
                self._watchdog.arm(CHECKPOINT_BOUND_S)
                self._link.phase("checkpoint", "waiting", self._waiting_for)
            self._commands.poll()
            time.sleep(min(POLL_S, max(end_s - now_s, 0.0)))
        self.while_waiting()
