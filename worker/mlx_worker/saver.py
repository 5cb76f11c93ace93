"""When a checkpoint is due, and how training goes on when it fails."""

import sys
import time
from typing import Any

from mlx_supervisor import wire
from mlx_worker import resume
from mlx_worker.checkpoints import CheckpointError, CheckpointStore
from mlx_worker.control import Control
from mlx_worker.lifeline import HangWatchdog
from mlx_worker.task import Task

CHECKPOINT_BOUND_S = 1800.0
"""No checkpoint is called hung sooner: a slow disk is not a hang."""


class Saver:
    """Saves every so many steps or seconds, the seconds counted from the end of the last attempt."""

    def __init__(self, job: wire.CheckpointJob, store: CheckpointStore, saved_step: int) -> None:
        self._job = job
        self._store = store
        self._last_s = time.monotonic()
        self._last_step = saved_step
        self.saved_step = saved_step
        self.error = ""

    def is_due(self, step: int) -> bool:
        """Whether either interval has passed."""
        by_steps = self._job.every_steps > 0 and step - self._last_step >= self._job.every_steps
        by_time = self._job.every_seconds > 0 and time.monotonic() - self._last_s >= self._job.every_seconds
        return by_steps or by_time

    def save(
        self,
        progress: resume.Progress,
        epoch: int,
        facts: dict[str, Any],
        task: Task,
        control: Control,
        watchdog: HangWatchdog,
    ) -> bool:
        """Save unless this step is saved already. A failure is reported, and False; it is not tried twice."""
        if self.saved_step == progress.step:
            return True
        if self.error and self._last_step == progress.step:
            return False
        control.phase("checkpoint", f"step {progress.step}")
        watchdog.arm(CHECKPOINT_BOUND_S)
        started_s = time.perf_counter()
        size_bytes, seconds, self.error = 0, 0.0, ""
        try:
            state = resume.trainer_state(progress, epoch, facts, task)
            arrays = resume.trained_arrays(task), resume.optimizer_arrays(task)
            saved = self._store.save(progress.step, *arrays, state)
            size_bytes, seconds, self.saved_step = saved.size_bytes, saved.seconds, progress.step
        except (CheckpointError, OSError) as error:
            self.error = str(error)
            print(f"checkpoint failed: {error}", file=sys.stderr)
        stall_s = time.perf_counter() - started_s
        control.link.send(
            wire.Checkpoint,
            step=progress.step, ok=not self.error, seconds=seconds or stall_s, stall_s=stall_s,
            size_bytes=size_bytes, error=self.error,
        )  # fmt: skip
        self._last_s, self._last_step = time.monotonic(), progress.step
        watchdog.arm()
        return not self.error
