"""When a checkpoint is due, which thread writes it, and how training continues after a failure."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from mlx_supervisor import wire
from mlx_worker.checkpoint import snapshot, training_state
from mlx_worker.checkpoint.background_writer import BackgroundWriter, Written, written
from mlx_worker.checkpoint.interval import MeasuredInterval, SlowDown
from mlx_worker.checkpoint.manifest import name_of
from mlx_worker.checkpoint.store import CheckpointError, CheckpointStore, LoadedCheckpoint, SavedCheckpoint
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
    """`automatic`: not made for a stop or the end. `stall_s`: how long training paused for it."""

    step: int
    best: BestUpdate | None
    started_s: float
    automatic: bool
    stall_s: float = 0.0


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
        self.error = ""

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
        self, progress: training_state.Progress, epoch: int, facts: dict[str, Any], task: Task, *, waiting: bool
    ) -> bool:
        """Save unless this step is saved already. A failure is reported and returns False; it is not retried.

        Without `waiting`, if memory allows, True means that the write has begun; a later call reports its end.
        Waits for a write that is already running. Raises MLX's errors: a failed device computes no more.
        """
        self.settle()
        best, self._unsaved_best = self._unsaved_best or self.best, None
        if self.saved_step == progress.step:
            return True
        if self.error and self._last_step == progress.step:
            return False
        self._last_s, self._last_step, self.error = time.monotonic(), progress.step, ""
        in_background = not waiting and self._memory.has_room(snapshot.size_bytes(task))
        if not in_background:
            self._pause_training(progress.step)
        started_s = time.perf_counter()
        noted = None if best is None else asdict(best)
        state = snapshot.take(progress, epoch, facts, task, noted, in_background=in_background)
        self._attempt = _Attempt(progress.step, best, started_s, automatic=not waiting)
        if in_background:
            self._writer.start(lambda: self._write(state, best))
            self._attempt.stall_s = time.perf_counter() - started_s
            return True
        outcome = written(lambda: self._write(state, best))
        self._attempt.stall_s = time.perf_counter() - started_s
        return self._finish(outcome)

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

    def _write(self, state: snapshot.Snapshot, best: BestUpdate | None) -> SavedCheckpoint:
        """Runs on either thread, one write at a time. The best checkpoint is kept however old it gets."""
        self._store.protected = frozenset() if best is None else frozenset({best.step})
        return self._store.save(state.step, state.trained, state.optimizer, state.trainer)

    def _finish(self, outcome: Written) -> bool:
        """Report how the attempt ended. Raises errors that are caused by neither the disk nor the weights."""
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        seconds, size_bytes = outcome.at_s - attempt.started_s, 0
        slow_down_s = self._slow_down.take_s()
        if attempt.automatic:
            # updates vary anyway: a write can cost them at most its own duration
            self._measured.note(attempt.stall_s + max(-seconds, min(slow_down_s, seconds)), seconds)
        if outcome.saved is not None:
            size_bytes, self.saved_step, self.best = outcome.saved.size_bytes, attempt.step, attempt.best
            for note in outcome.saved.notes:
                print(f"note: {note}")
        else:
            self.error = str(outcome.error) or type(outcome.error).__name__
            print(f"checkpoint failed: {self.error}", file=sys.stderr)
        self._link.send(
            wire.Checkpoint,
            step=attempt.step, ok=not self.error, seconds=seconds, stall_s=attempt.stall_s,
            size_bytes=size_bytes, error=self.error,
        )  # fmt: skip
        self._watchdog.arm()
        if outcome.error is not None and not isinstance(outcome.error, CheckpointError | OSError):
            raise outcome.error
        return not self.error


def _best_of(newest: LoadedCheckpoint | None, store: CheckpointStore) -> BestUpdate | None:
    """The best update that an earlier generation recorded, if its checkpoint still exists."""
    noted = None if newest is None else newest.trainer.get("best")
    if not isinstance(noted, dict):
        return None
    step, loss = noted.get("step"), noted.get("loss")
    if not isinstance(step, int) or not isinstance(loss, float) or not (store.folder / name_of(step)).is_dir():
        return None
    return BestUpdate(step, loss)
