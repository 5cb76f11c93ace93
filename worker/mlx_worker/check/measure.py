"""A few real updates with the longest samples, by the loop that a run uses; the supervisor samples this process."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from mlx_supervisor import wire
from mlx_supervisor.wire.check import MeasureReport
from mlx_worker.check.longest import STREAM_READ, Updates, longest, spread
from mlx_worker.checkpoint.manifest import CHECKPOINTS
from mlx_worker.checkpoint.store import CheckpointStore, SavedCheckpoint
from mlx_worker.data.sources import head_of, is_sized
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.task import EvaluationContext, Task
from mlx_worker.tasks.mlx_lm.inputs import LoraInputs
from mlx_worker.training import loop
from mlx_worker.training.commands import Commands
from mlx_worker.training.drills import Drills

TYPICAL = 2
"""Updates with samples as they come, first: programs and buffers of other shapes stay in memory in a run too."""
LONGEST = 5
"""Then updates with the longest samples. The first of them compiles; the last two are timed."""
SAVED_EVERY = TYPICAL + 1
"""The update after which a checkpoint's snapshot is taken; the next two hold it in memory."""
TIMED = 2
EVALUATE_AT_MOST_S = 10.0
NO_LIMIT_BYTES = 2**62
HOLD_AT_MOST_S = 60.0
"""How long a snapshot is held, if no update ends meanwhile."""


class _EnoughError(Exception):
    """Raised inside an evaluation that took long enough."""


class RecordingLink(Link):
    """A link without a supervisor that keeps the updates' figures."""

    def __init__(self, job: wire.Job) -> None:
        super().__init__(job.run, job.generation, None)
        self._connect("inproc://nobody")  # a run's worker loads this library too
        self.seconds: list[float] = []
        self.tokens = self.peak_bytes = 0
        self.updated = threading.Condition()

    def send(self, kind: type[wire.Message], **fields: Any) -> None:
        """Keep a step's figures; drop everything else."""
        if kind is not wire.Step:
            return
        self.peak_bytes = max(self.peak_bytes, fields["peak_bytes"])
        self.tokens = fields["tokens"]
        with self.updated:
            self.seconds.append(fields["seconds"])
            self.updated.notify_all()

    def phase(self, name: wire.PhaseName, detail: str = "", waiting_for: str = "") -> None:
        """A checkpoint that pauses training waits for the one before."""
        super().phase(name, detail, waiting_for)
        if name == "checkpoint":
            with self.updated:
                self.updated.notify_all()


class NoStore(CheckpointStore):
    """Writes nothing: it holds a snapshot in memory for the time of two updates, as a slow disk does."""

    def __init__(self, job: wire.Job, link: RecordingLink) -> None:
        super().__init__(Path(job.run_dir) / CHECKPOINTS, job.run, job.checkpoint.keep)
        self.link = link
        self.saved = False

    def free_bytes(self) -> int:
        """Nothing is written, so there is always room."""
        return NO_LIMIT_BYTES

    def save(
        self, step: int, trained: Any, optimizer: Any, trainer: Any, reserve_bytes: int = 0, more: Any = None
    ) -> SavedCheckpoint:
        """Keep the arrays alive until two more updates are done, or the loop waits for this checkpoint."""
        self.saved = True
        until = len(self.link.seconds) + 2
        with self.link.updated:
            self.link.updated.wait_for(
                lambda: len(self.link.seconds) >= until or self.link.current_phase == "checkpoint", HOLD_AT_MOST_S
            )
        named = [trained, optimizer, *(more or {}).values()]
        size_bytes = sum(array.nbytes for arrays in named for array in arrays.values())
        return SavedCheckpoint(self.folder, size_bytes, 0.0)


def measure(job: wire.Job, stop: StopFlag, inputs: LoraInputs | None) -> MeasureReport:
    """Build the task and train a few updates at the job's micro-batch. Raises RefusedError and the task's errors."""
    if job.memory.policy == "adaptive":  # its cache takes only what is left, and is given back: not needed memory
        job = msgspec.structs.replace(job, memory=msgspec.structs.replace(job.memory, cache_limit_bytes=0))
    memory = CachePolicy(job.memory)
    link = RecordingLink(job)
    commands = Commands(link, stop, memory)
    job, task, plan = loop.prepare(job, inputs, connects=False)
    if not is_sized(task.dataset):
        task = replace(task, dataset=head_of(task.dataset, max(STREAM_READ, 2 * plan.size)))
    accumulation = 1 if plan.effective <= plan.size else 2  # a third micro-batch needs no more than the second
    samples = longest(task, plan.size * accumulation)
    few = replace(
        task,
        dataset=Updates([*spread(task, len(samples), TYPICAL), samples]), lengths=None,
        evaluate=None, evaluate_every_steps=0, export=None, milestone=None, milestone_every_steps=0,
        after_update=None, report_update=None, after_evaluation=None, test=None,
    )  # fmt: skip
    checkpoint = msgspec.structs.replace(
        job.checkpoint, every_steps=SAVED_EVERY, every_seconds=0.0, overhead=0.0, keep_best=False
    )
    job = msgspec.structs.replace(job, checkpoint=checkpoint, stop_on_not_finite=False)
    store = NoStore(job, link)
    began_s = time.monotonic()
    few_plan = loop.Plan(min(plan.size, len(samples)), len(samples), TYPICAL + LONGEST)
    loop.Trainer(job, few, few_plan, memory, commands, Drills(wire.DrillJob(), 1), store).run()
    all_of_it = _evaluate(task, plan, memory)
    return MeasureReport(
        problems=[],
        batch_size=few_plan.size, accumulation=accumulation, began_s=began_s,
        update_s=sum(link.seconds[-TIMED:]) / TIMED * plan.effective / len(samples), tokens=link.tokens,
        peak_bytes=max(link.peak_bytes, mx.get_peak_memory()),
        evaluated=all_of_it is not None, evaluated_all=all_of_it is True, saved=store.saved,
    )  # fmt: skip


def _evaluate(task: Task, plan: loop.Plan, memory: CachePolicy) -> bool | None:
    """Evaluate for a few seconds. Returns whether that was all of it; None without an evaluation."""
    if task.evaluate is None:
        return None
    end_s = time.monotonic() + EVALUATE_AT_MOST_S

    def progress() -> None:
        memory.note_evaluated()
        if time.monotonic() > end_s:
            raise _EnoughError

    memory.start_peak()
    task.model.eval()
    try:
        task.evaluate(task.model, EvaluationContext(plan.size, progress, memory.clears))
    except _EnoughError:
        return False
    return True
