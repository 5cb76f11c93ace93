"""When a checkpoint is due, which thread writes it, and how training continues after a failure."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mlx_supervisor import wire
from mlx_worker.checkpoint import snapshot, training_state
from mlx_worker.checkpoint.background_writer import BackgroundWriter, Written, written
from mlx_worker.checkpoint.interval import MeasuredInterval, SlowDown
from mlx_worker.checkpoint.manifest import name_of
from mlx_worker.checkpoint.store import (
    LAST_RESERVE_BYTES,
    RESERVE_BYTES,
    CheckpointError,
    CheckpointStore,
    DiskError,
    LoadedCheckpoint,
    SavedCheckpoint,
)
from mlx_worker.checkpoint.user_state import MoreState
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.hang_watchdog import HangWatchdog
from mlx_worker.supervision.link import Link
from mlx_worker.task import Task

CHECKPOINT_BOUND_S = 1800.0
"""A checkpoint may take this long before it counts as hung: a slow disk is not a hang."""


@dataclass(frozen=True)
class BestUpdate:
    """The update with the lowest validation loss so far."""

    step: int
    loss: float


@dataclass
class _Attempt:
    """`automatic`: not made for a stop or the end. `stall_s`: how long training paused for it. `again`: a repetition,
    whose failure is not reported again."""

    step: int
    best: BestUpdate | None
    started_s: float
    automatic: bool
    stall_s: float = 0.0
    again: bool = False


NOTES_LIMIT = 16
"""Notes that fit into a message on a checkpoint."""
NOTES_KEPT = 1000
TIGHTER_INTERVALS = 8
"""Intervals of `tighter_steps` after which the tighter interval ends: by then this generation has made four times as
many updates as the one that saved nothing."""


class Saver:
    """Saves as configured in the job, in the background, one checkpoint at a time.

    Use from the training thread, between updates: only that thread may use the link. Intervals count from the start of
    the last attempt, successful or not. `newest` is the checkpoint that this generation resumed from.
    """

    def __init__(
        self,
        job: wire.Job,
        store: CheckpointStore,
        newest: LoadedCheckpoint | None,
        link: Link,
        memory: CachePolicy,
        watchdog: HangWatchdog,
    ) -> None:
        self._job = job.checkpoint
        self._store, self._link, self._memory, self._watchdog = store, link, memory, watchdog
        self._started_s = self._last_s = time.monotonic()
        self._start_step = 0 if newest is None else newest.step
        self._last_step = self.saved_step = 0 if newest is None else newest.step
        self.best = _best_of(newest, store) if job.checkpoint.keep_best else None
        self._unsaved_best: BestUpdate | None = None
        self._measured = MeasuredInterval(job.checkpoint.overhead, job.checkpoint.mean_time_between_failures_s)
        self._slow_down = SlowDown()
        self._writer = BackgroundWriter()
        self._attempt: _Attempt | None = None
        self._failed: tuple[snapshot.Snapshot, BestUpdate | None] | None = None
        self._noted: set[str] = set()
        self.error = ""
        self.can_retry = False
        """Whether the last failure was the disk's, so that `retry` may succeed."""

    def note_update(self, seconds: float) -> None:
        """Record an update's time. Reports a checkpoint that was written meanwhile; raises as `save` does."""
        self._slow_down.note_update(seconds, writing=self._writer.busy)
        done = self._writer.collect()
        if done is not None:
            self._finish(done)
        elif self._attempt is not None and time.perf_counter() - self._attempt.started_s > CHECKPOINT_BOUND_S:
            self.settle()  # a disk that never answers: let the watchdog restart the worker

    def note_evaluation(self, step: int, loss: float) -> None:
        """With `keep_best`, a new best state makes a checkpoint due at once. Step 0 has nothing to save."""
        if not self._job.keep_best or step == 0 or not math.isfinite(loss):
            return
        self.settle()  # the running write may hold a better state, and may fail
        if self.best is None or loss < self.best.loss:
            self._unsaved_best = BestUpdate(step, loss)

    def is_due(self, step: int) -> bool:
        """Whether an interval has passed. A time interval waits for a busy writer; an update interval or a new best
        does not: `save` then waits for the writer."""
        job = self._job
        since_steps = step - self._last_step
        if self._unsaved_best is not None or 0 < job.every_steps <= since_steps:
            return True
        if 0 < job.tighter_steps <= since_steps and step - self._start_step <= TIGHTER_INTERVALS * job.tighter_steps:
            return True
        if self._writer.busy:
            return False
        now_s = time.monotonic()
        since_s = now_s - self._last_s
        worthwhile = job.overhead > 0 and since_s >= self._measured.seconds(now_s - self._started_s)
        return worthwhile or 0 < job.every_seconds <= since_s

    def save(
        self,
        progress: training_state.Progress,
        epoch: int,
        facts: dict[str, Any],
        task: Task,
        *,
        waiting: bool,
        more: Callable[[], MoreState] = MoreState,
    ) -> bool:
        """Save unless this step is saved already. A failure is reported and returns False.

        Without `waiting`, if memory allows, True means that the write has begun; a later call reports its end. With
        it, a state that the disk refused is kept for `retry`. Waits for a write that is already running. Raises MLX's
        errors: a failed device computes no more.
        """
        self.settle()
        best, self._unsaved_best = self._unsaved_best or self.best, None
        if self.saved_step == progress.step and self._still_saved(progress.step):
            return True
        again = bool(self.error) and self._last_step == progress.step
        if again and not (waiting and self.can_retry):
            return False
        self._last_s, self._last_step, self.error, self._failed = time.monotonic(), progress.step, "", None
        extra = more()
        in_background = not waiting and self._memory.has_room(snapshot.size_bytes(task, extra))
        if not in_background:
            self._pause_training(progress.step)
        started_s = time.perf_counter()
        noted = None if best is None else asdict(best)
        state = snapshot.take(progress, epoch, facts, task, noted, in_background=in_background, more=extra)
        self._attempt = _Attempt(progress.step, best, started_s, automatic=not waiting, again=again)
        if in_background:
            self._writer.start(lambda: self._write(state, best))
            self._attempt.stall_s = time.perf_counter() - started_s
            return True
        self._failed = (state, best) if waiting else None
        return self._write_now(state, best, LAST_RESERVE_BYTES if waiting else RESERVE_BYTES)

    def retry(self) -> bool:
        """Write the state of the last `save` with `waiting` again. Only success is reported."""
        assert self._failed is not None, "nothing to retry"
        state, best = self._failed
        self._watchdog.arm(CHECKPOINT_BOUND_S)
        self._attempt = _Attempt(state.step, best, time.perf_counter(), automatic=False, again=True)
        self.error = ""
        return self._write_now(state, best, LAST_RESERVE_BYTES)

    def _write_now(self, state: snapshot.Snapshot, best: BestUpdate | None, reserve_bytes: int) -> bool:
        assert self._attempt is not None
        outcome = written(lambda: self._write(state, best, reserve_bytes))
        self._attempt.stall_s = time.perf_counter() - self._attempt.started_s
        return self._finish(outcome)

    def _still_saved(self, step: int) -> bool:
        """Whether the checkpoint was not deleted by another program; step 0 has nothing to save."""
        return step == 0 or (self._store.folder / name_of(step)).is_dir()

    def settle(self) -> None:
        """Wait for the running write, if there is one, and report its end."""
        if self._attempt is None:
            return
        self._pause_training(self._attempt.step)
        started_s = time.perf_counter()
        outcome = self._writer.collect(waiting=True)
        assert outcome is not None
        self._attempt.stall_s += time.perf_counter() - started_s
        self._finish(outcome)

    def _pause_training(self, step: int) -> None:
        self._link.phase("checkpoint", f"step {step}")
        self._watchdog.arm(CHECKPOINT_BOUND_S)

    def _write(
        self, state: snapshot.Snapshot, best: BestUpdate | None, reserve_bytes: int = RESERVE_BYTES
    ) -> SavedCheckpoint:
        """Runs on either thread, one write at a time. The best checkpoint is kept however old it gets."""
        self._store.protected = frozenset() if best is None else frozenset({best.step})
        return self._store.save(state.step, state.trained, state.optimizer, state.trainer, reserve_bytes, state.more)

    def _finish(self, outcome: Written) -> bool:
        """Report how the attempt ended. Raises errors that are caused by neither the disk nor the weights."""
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        seconds, size_bytes, notes = outcome.at_s - attempt.started_s, 0, list[str]()
        slow_down_s = self._slow_down.take_s()
        if attempt.automatic:
            # updates vary anyway: a write can cost them at most its own duration
            self._measured.note(attempt.stall_s + max(-seconds, min(slow_down_s, seconds)), seconds)
        if outcome.saved is not None:
            size_bytes, self.saved_step, self.best = outcome.saved.size_bytes, attempt.step, attempt.best
            self._failed = None
            notes = self._new_notes(outcome.saved)
        else:
            self.error = str(outcome.error) or type(outcome.error).__name__
            self.can_retry = isinstance(outcome.error, DiskError | OSError)
            if not attempt.again:
                print(f"checkpoint failed: {self.error}", file=sys.stderr)
        if not (self.error and attempt.again):
            self._link.send(
                wire.Checkpoint,
                step=attempt.step, ok=not self.error, seconds=seconds, stall_s=attempt.stall_s,
                size_bytes=size_bytes, error=self.error, notes=notes,
            )  # fmt: skip
        self._watchdog.arm()
        if outcome.error is not None and not isinstance(outcome.error, CheckpointError | OSError):
            raise outcome.error
        return not self.error

    def _new_notes(self, saved: SavedCheckpoint) -> list[str]:
        """The notes on this save that no earlier save had: a folder that cannot be deleted is reported once."""
        notes = [note for note in saved.notes if note not in self._noted][:NOTES_LIMIT]
        if len(self._noted) < NOTES_KEPT:
            self._noted.update(notes)
        for note in notes:
            print(f"note: {note}")
        return notes


def _best_of(newest: LoadedCheckpoint | None, store: CheckpointStore) -> BestUpdate | None:
    """The best update that an earlier generation recorded, if its checkpoint still exists."""
    noted = None if newest is None else newest.trainer.get("best")
    if not isinstance(noted, dict):
        return None
    step, loss = noted.get("step"), noted.get("loss")
    if not isinstance(step, int) or not isinstance(loss, float) or not (store.folder / name_of(step)).is_dir():
        return None
    return BestUpdate(step, loss)
