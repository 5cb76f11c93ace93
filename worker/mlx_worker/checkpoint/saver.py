"""When a checkpoint is due, who writes it, and how training goes on when it fails."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from mlx_supervisor import wire
from mlx_worker.checkpoint import snapshot, training_state
from mlx_worker.checkpoint.background_writer import BackgroundWriter, Written, written
from mlx_worker.checkpoint.interval import Measured, SlowDown
from mlx_worker.checkpoint.manifest import name_of
from mlx_worker.checkpoint.store import CheckpointError, CheckpointStore, LoadedCheckpoint, SavedCheckpoint
from mlx_worker.memory.cache_policy import Memory
from mlx_worker.supervision.hang_watchdog import HangWatchdog
from mlx_worker.supervision.link import Link
from mlx_worker.task import Task

CHECKPOINT_BOUND_S = 1800.0
"""No checkpoint is called hung sooner: a slow disk is not a hang."""


@dataclass(frozen=True)
class Best:
    """The update whose validation loss was the lowest so far."""

    step: int
    loss: float


@dataclass
class _Attempt:
    """`by_itself`: neither a stop nor the supervisor asked for it. `stall_s`: that training stood still for it."""

    step: int
    best: Best | None
    started_s: float
    by_itself: bool
    stall_s: float = 0.0


TIGHTER_TIMES = 8
"""After so many times `tighter_steps` updates, a life has outlived the one that saved nothing four times over."""


class Saver:
    """Saves as the job says, in the background, one checkpoint at a time.

    To be used by the thread that trains, between updates: it alone may talk to the supervisor. Intervals count from the
    beginning of the last attempt, whether it succeeded or not. `newest` is what this life began with.
    """

    def __init__(
        self,
        job: wire.Job,
        store: CheckpointStore,
        newest: LoadedCheckpoint | None,
        link: Link,
        memory: Memory,
        watchdog: HangWatchdog,
    ) -> None:
        self._job = job.checkpoint
        self._store, self._link, self._memory, self._watchdog = store, link, memory, watchdog
        self._born_s = self._last_s = time.monotonic()
        self._born_step = 0 if newest is None else newest.step
        self._last_step = self.saved_step = 0 if newest is None else newest.step
        self.best = _best_of(newest, store) if job.checkpoint.keep_best else None
        self._candidate: Best | None = None
        self._measured = Measured(job.checkpoint.overhead, job.checkpoint.mean_time_between_failures_s)
        self._slow_down = SlowDown()
        self._writer = BackgroundWriter()
        self._attempt: _Attempt | None = None
        self.error = ""

    def note_update(self, seconds: float) -> None:
        """An update took so long. Tells of a checkpoint that was written meanwhile; raises as `save` does."""
        self._slow_down.note_update(seconds, writing=self._writer.busy)
        done = self._writer.collect()
        if done is not None:
            self._finish(done)
        elif self._attempt is not None and time.perf_counter() - self._attempt.started_s > CHECKPOINT_BOUND_S:
            self.settle()  # a disk that never answers: better found hung and started again than never saved again

    def note_evaluation(self, step: int, loss: float) -> None:
        """With `keep_best`, the best state so far is due whatever the interval. Step 0 has nothing to save."""
        if not self._job.keep_best or step == 0 or not math.isfinite(loss):
            return
        self.settle()  # it may be a better one that is under way, and it may fail
        if self.best is None or loss < self.best.loss:
            self._candidate = Best(step, loss)

    def is_due(self, step: int) -> bool:
        """Whether an interval has passed. One of time waits for a writer that is busy; one of updates is kept exactly,
        and so is a best state: `save` then waits for the writer."""
        job = self._job
        since_steps = step - self._last_step
        if self._candidate is not None or 0 < job.every_steps <= since_steps:
            return True
        if 0 < job.tighter_steps <= since_steps and step - self._born_step <= TIGHTER_TIMES * job.tighter_steps:
            return True
        if self._writer.busy:
            return False
        now_s = time.monotonic()
        since_s = now_s - self._last_s
        by_worth = job.overhead > 0 and since_s >= self._measured.seconds(now_s - self._born_s)
        return by_worth or 0 < job.every_seconds <= since_s

    def save(
        self, progress: training_state.Progress, epoch: int, facts: dict[str, Any], task: Task, *, waiting: bool
    ) -> bool:
        """Save unless this step is saved already. A failure is told, and False; it is not tried twice.

        Where it is not `waiting`, and memory allows, True means that the write has begun; a later call tells its end.
        A write that is under way is waited for. Raises what MLX raises: a device that failed computes no more.
        """
        self.settle()
        best, self._candidate = self._candidate or self.best, None
        if self.saved_step == progress.step:
            return True
        if self.error and self._last_step == progress.step:
            return False
        self._last_s, self._last_step, self.error = time.monotonic(), progress.step, ""
        aside = not waiting and self._memory.has_room(snapshot.size_bytes(task))
        if not aside:
            self._stand_still(progress.step)
        started_s = time.perf_counter()
        state = snapshot.take(progress, epoch, facts, task, None if best is None else asdict(best), aside=aside)
        self._attempt = _Attempt(progress.step, best, started_s, by_itself=not waiting)
        if aside:
            self._writer.start(lambda: self._write(state, best))
            self._attempt.stall_s = time.perf_counter() - started_s
            return True
        outcome = written(lambda: self._write(state, best))
        self._attempt.stall_s = time.perf_counter() - started_s
        return self._finish(outcome)

    def settle(self) -> None:
        """Wait for the write that is under way, if there is one, and tell its end."""
        if self._attempt is None:
            return
        self._stand_still(self._attempt.step)
        started_s = time.perf_counter()
        outcome = self._writer.collect(waiting=True)
        assert outcome is not None
        self._attempt.stall_s += time.perf_counter() - started_s
        self._finish(outcome)

    def _stand_still(self, step: int) -> None:
        self._link.phase("checkpoint", f"step {step}")
        self._watchdog.arm(CHECKPOINT_BOUND_S)

    def _write(self, state: snapshot.Snapshot, best: Best | None) -> SavedCheckpoint:
        """In whichever thread: there is one write at a time. The best stays, however old it gets."""
        self._store.protected = frozenset() if best is None else frozenset({best.step})
        return self._store.save(state.step, state.trained, state.optimizer, state.trainer)

    def _finish(self, outcome: Written) -> bool:
        """Tell how the attempt ended. Raises what is neither the disk's fault nor the weights'."""
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        seconds, size_bytes = outcome.at_s - attempt.started_s, 0
        slow_down_s = self._slow_down.take_s()
        if attempt.by_itself:
            # updates vary by themselves: what a write can have taken from them is at most its own length
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


def _best_of(newest: LoadedCheckpoint | None, store: CheckpointStore) -> Best | None:
    """The best that an earlier life noted, if it is still there."""
    noted = None if newest is None else newest.trainer.get("best")
    if not isinstance(noted, dict):
        return None
    step, loss = noted.get("step"), noted.get("loss")
    if not isinstance(step, int) or not isinstance(loss, float) or not (store.folder / name_of(step)).is_dir():
        return None
    return Best(step, loss)
