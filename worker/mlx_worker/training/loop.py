"""The training loop: building the task, resuming, training, saving and exporting."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten

from mlx_supervisor import wire
from mlx_worker.checkpoint import changes, training_state
from mlx_worker.checkpoint.manifest import CHECKPOINTS
from mlx_worker.checkpoint.rng_state import seed_generators
from mlx_worker.checkpoint.saver import CHECKPOINT_BOUND_S, Saver
from mlx_worker.checkpoint.store import CheckpointStore, LoadedCheckpoint, weights_sha256
from mlx_worker.data.sample_log import SampleLog
from mlx_worker.data.sources import DataEndedError, length_of
from mlx_worker.errors import ChangedError, NotFiniteError, RefusedError
from mlx_worker.extras.extras import Extras, plan_batches
from mlx_worker.memory import gradient_checkpointing
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.hang_watchdog import HangWatchdog
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.task import Task, Update
from mlx_worker.tasks import mistakes
from mlx_worker.tasks.mlx_lm.inputs import LoraInputs, read_inputs
from mlx_worker.tasks.output_claim import advice, claimed
from mlx_worker.tasks.settings_key import settings_key
from mlx_worker.training import groups
from mlx_worker.training.batch_request import with_request
from mlx_worker.training.commands import Commands
from mlx_worker.training.drills import Drills
from mlx_worker.training.evaluation import Evaluation
from mlx_worker.training.finishing import Finishing
from mlx_worker.training.gradients import Applied, Gradients
from mlx_worker.training.metrics import numbers_of


@dataclass(frozen=True)
class TrainingResult:
    """How a generation ended. `steps` and `seconds` count this generation's training loop.

    `lost`: what a stop kept from being saved or exported, "" if nothing. `exported`: the result's folder, "" if none.
    """

    completed: bool
    reason: str
    progress: training_state.Progress
    weights_sha256: str
    steps: int
    seconds: float
    lost: str = ""
    exported: str = ""


@dataclass(frozen=True)
class Plan:
    """`size`: samples of a micro-batch; `effective`: samples of one update; `steps`: updates in total."""

    size: int
    effective: int
    steps: int


class Prepared(NamedTuple):
    """A task ready for its first update, and the job with what it leaves to the task."""

    job: wire.Job
    task: Task
    plan: Plan


def run(job: wire.Job, link: Link, stop: StopFlag, inputs: LoraInputs | None = None) -> TrainingResult:
    """Load, train until the last step or a stop, save, return the result. `inputs`: read already, before MLX.

    Raises RefusedError, NotFiniteError, and errors of MLX and the task.
    """
    memory = CachePolicy(job.memory)
    if facts := memory.device.facts(memory.device_limit_bytes):
        link.send(wire.Device, **facts)
    commands = Commands(link, stop, memory)
    drills = Drills(job.drill, job.generation)
    drills.slow_start(stop)
    with mistakes.refused(job, lambda: link.last_step):
        job, task, plan = prepare(job, inputs)
        key = "adapter_path" if job.task.kind == "mlx_lm" else "Task.export_dir"
        with claimed(task.export_dir, job, key, kept=_resumed_files(job, task)) as begin:
            try:
                trainer = Trainer(job, task, plan, memory, commands, drills)
            except ChangedError as error:
                raise RefusedError(f"{error} {advice(task.export_dir, job)}".rstrip()) from error
            trainer.notes += begin()
            with contextlib.closing(trainer.sample_log):
                return trainer.run()


def _resumed_files(job: wire.Job, task: Task) -> list[Path]:
    """Where the adapters may be that an mlx_lm task starts from: a restart reads them again."""
    fact = task.fixed.get("resume_adapter_file") if job.task.kind == "mlx_lm" else None
    if not isinstance(fact, dict):
        return []
    bases: list[str | Path] = [job.task.base_dir, *([] if job.task.config is None else [Path(job.task.config).parent])]
    return [Path(base) / Path(fact["path"]).expanduser() for base in bases]


def prepare(job: wire.Job, inputs: LoraInputs | None = None, *, connects: bool = True) -> Prepared:
    """Load the task. `connects`: see `build_task`. Raises RefusedError."""
    job = with_seed(job, inputs)
    seed_generators(job.seed)
    task = build_task(job, inputs, connects=connects)
    job = with_request(job, task)
    replace_by_settings(job, task)
    if not tree_flatten(task.model.trainable_parameters()):
        raise RefusedError("Task.model has no trainable parameters; unfreeze at least one")
    mx.eval(task.model.state)
    task.optimizer.init(task.model.trainable_parameters())
    return Prepared(job, task, plan_of(job, task))


def with_seed(job: wire.Job, inputs: LoraInputs | None = None) -> wire.Job:
    """The job with its task's seed, where the job leaves the seed to the task. Raises RefusedError."""
    if not job.seed_from_task:
        return job
    config = (inputs or read_inputs(job)).config
    return msgspec.structs.replace(job, seed=config.values.seed)


def build_task(job: wire.Job, inputs: LoraInputs | None = None, *, connects: bool = True) -> Task:
    """The job's task; without `connects` it connects to no reporting service. Raises RefusedError."""
    if job.task.kind == "python":
        from mlx_worker.tasks import python

        return python.build(job)
    from mlx_worker.tasks.mlx_lm.task import build

    return build(job, inputs, connects=connects)


def replace_by_settings(job: wire.Job, task: Task) -> None:
    """The settings' own values count, not the task's; 0 switches off."""
    if job.max_grad_norm is not None:
        task.max_grad_norm = job.max_grad_norm or None
    if job.ema_decay is not None:
        task.ema_decay = job.ema_decay or None


def plan_of(job: wire.Job, task: Task) -> Plan:
    """Batch and steps: from the job, else from the task. Raises RefusedError."""
    size = job.batch.size or task.batch_size
    if size is None:
        raise RefusedError(f"{settings_key(job, 'batch.size')} is missing: set it, or Task.batch_size in the task")
    effective = job.batch.effective or size * task.accumulation
    size = min(size, effective)
    steps = job.steps or task.steps
    if steps is None:
        raise RefusedError(f"{settings_key(job, 'steps')} is missing: set it, or Task.steps in the task")
    samples = length_of(task.dataset)
    if samples == 0:
        raise RefusedError("Task.dataset is empty; at least 1 sample is needed")
    if samples is not None and effective > samples:
        where = "Task.batch_size × Task.accumulation" if job.batch.from_task else settings_key(job, "batch")
        raise RefusedError(
            f"the effective batch of {effective} samples (batch.size = {size}) exceeds the dataset's {samples}; use at "
            f"most {samples} ({where})"
        )
    return Plan(size, effective, steps)


def collate(task: Task, samples: list[Any]) -> tuple[mx.array, ...]:
    """What the loss gets for a micro-batch, after the model."""
    arrays = task.collate(samples)
    arrays = arrays if isinstance(arrays, tuple | list) else (arrays,)
    return tuple(array if isinstance(array, mx.array) else mx.array(array) for array in arrays)


@dataclass(frozen=True)
class _Launched:
    """An update that the device is computing. `cursor`: samples taken in total after it; `size`: as in the plan."""

    step: int
    epoch: int
    ids: list[int]
    cursor: int
    size: int
    accumulation: int
    started_s: float
    applied: Applied
    counts_tokens: bool


class Trainer:
    """One generation of a run, from its newest checkpoint on."""

    def __init__(
        self,
        job: wire.Job,
        task: Task,
        plan: Plan,
        memory: CachePolicy,
        commands: Commands,
        drills: Drills,
        store: CheckpointStore | None = None,
    ) -> None:
        self.job, self.task, self.plan = job, task, plan
        self.group = groups.group_of(job, task)
        self.memory, self.commands, self.drills = memory, commands, drills
        self.link, self.stop = commands.link, commands.stop
        self.recomputes = gradient_checkpointing.start(task, requested=job.memory.gradient_checkpointing)
        self.facts = training_state.recipe(job, task, plan.steps, plan.size, plan.effective)
        store = store or CheckpointStore(Path(job.run_dir) / CHECKPOINTS, job.run, job.checkpoint.keep)
        newest = store.load_newest()
        self.progress, changed = self._restore(newest)
        self.checkpoint = None if newest is None else newest.path.name
        self.skipped = store.skipped
        self.extras = Extras(
            task,
            newest,
            lambda: plan_batches(task, job.seed, self.progress.cursor, self.facts),
            lambda: self.link.phase("load", "skipping samples"),
        )
        self.source, self.average = self.extras.source, self.extras.average
        self.notes = [*changed, *self.extras.notes, *task.notes]
        self.watchdog = HangWatchdog(job.hang_timeout_s, lambda: commands.stop.supervised)
        self.saver = Saver(job, store, newest, self.link, memory, self.watchdog)
        self.finishing = Finishing(job, task, store, self.saver, commands, self.watchdog, self.extras)
        self.notes += self.finishing.check(resumed=newest is not None)
        self.evaluation = Evaluation(job, task, commands, memory, self.watchdog, self.saver, self.average)
        self.sample_log = SampleLog(job)
        self.finishing.while_waiting = self.sample_log.flush
        self._finished_s = float("-inf")
        self._first_step = self.progress.step + 1

    def _restore(self, newest: LoadedCheckpoint | None) -> tuple[training_state.Progress, list[str]]:
        if newest is None:
            return training_state.Progress(), changes.tighter(self.job.checkpoint, None)
        return training_state.restore(newest, self.task, self.facts, self.job)

    def run(self) -> TrainingResult:
        """Train, save, export."""
        self.link.send(
            wire.Ready,
            step=self.progress.step, target_steps=self.plan.steps, batch_size=self.plan.size,
            effective_batch=self.plan.effective, checkpoint=self.checkpoint,
            skipped=self.skipped, notes=self.notes,
            gradient_checkpointing=self.recomputes,
            can_checkpoint_gradients=self.recomputes or not gradient_checkpointing.why_not(self.task),
            requested_size=self.job.batch.requested_size, requested_effective=self.job.batch.requested_effective,
        )  # fmt: skip
        for note in [*self.skipped, *self.notes]:
            print(f"note: {note}")
        started_s = time.perf_counter()
        self.link.phase("train")
        try:
            self._train()
        except BaseException:
            with contextlib.suppress(Exception):  # a finished checkpoint is worth a slower exit
                self.saver.settle()
            raise
        seconds = time.perf_counter() - started_s
        saved = self._save(waiting=True)
        if self.progress.step >= self.plan.steps:
            lost = self.finishing.deliver(self.progress.step, saved=saved)
            completed = not lost
        else:
            lost = self.finishing.save_before_exit(self.progress.step, saved=saved)
            completed = False
        if completed:
            self.evaluation.test(self.progress.step, self.plan.size)
        self.watchdog.disarm()
        reason = "all steps done" if completed else self.stop.reason or ""
        digest = weights_sha256(training_state.trained_arrays(self.task))
        return TrainingResult(
            completed,
            reason,
            self.progress,
            digest,
            self.progress.step + 1 - self._first_step,
            seconds,
            lost,
            self.finishing.exported,
        )

    def _train(self) -> None:
        task, progress = self.task, self.progress
        gradients = Gradients(task, splits=self.memory.splits_update, average=self.average)
        self.commands.autopsy.count_shapes = lambda: gradients.shapes
        task.model.train()
        if progress.step == 0 and task.evaluate_every_steps and not self.stop.requested:
            self.evaluation.validate(progress.step, self.plan.size)
        self.watchdog.arm()
        self.memory.start_peak()
        launched: _Launched | None = None  # the update that the device computes while the next is prepared
        while True:
            self.commands.poll()
            if launched is not None and self._must_finish_first(launched.step):
                self._finish(launched)
                launched = None
                self._between_updates()
                continue
            self._resize()
            step = progress.step + 1 if launched is None else launched.step + 1
            if self.stop.requested or step > self.plan.steps:
                break
            before = launched
            try:
                launched = self._launch(gradients, step)
            except DataEndedError:
                if before is not None:
                    self._finish(before)
                self._save(waiting=True)  # with other data, training continues from here
                raise
            if before is not None:
                self._finish(before)
        if launched is not None:
            self._finish(launched)
            self._between_updates()
        self._run_autopsy(more_updates=False)

    def _must_finish_first(self, step: int) -> bool:
        """Whether something needs the exact state after this update, before the next one begins."""
        if self.task.after_update is not None:
            return True  # it may read the model
        if self.task.state is not None and step == self._first_step:
            return True
        waits = self.memory.waits or self.drills.within_updates or self.commands.autopsy.is_due(step)
        evaluates = self.evaluation.is_due(step, self.plan.steps)
        return waits or evaluates or self.saver.is_due(step) or self._milestone_is_due(step)

    def _launch(self, gradients: Gradients, step: int) -> _Launched:
        """Start the next update on the device."""
        started_s = time.perf_counter()
        epoch, ids = self.source.next(self.plan.effective)
        micro_batches = groups.cut(ids, self.plan.size, self.group)
        alone = len(micro_batches) == 1

        self.memory.before_gradients()
        for chosen, ends_group in micro_batches:
            gradients.add(collate(self.task, self.source.load(chosen)), len(chosen), alone=alone, ends_group=ends_group)
            if not alone or self.memory.splits_update:
                gradients.evaluate(waiting=self.memory.waits)
                self.memory.after_gradients()
                self.commands.poll()
                self.watchdog.arm()
        self.drills.within_update(step)
        applied = gradients.apply()
        return _Launched(
            step, epoch, ids, self.source.cursor, self.plan.size, len(micro_batches), started_s, applied,
            gradients.counts_tokens,
        )  # fmt: skip

    def _finish(self, launched: _Launched) -> None:
        """Wait until the update is done, and report it. Raises NotFiniteError if the job stops on that."""
        progress, loss_before = self.progress, self.progress.loss
        loss, weight, rate = launched.applied.wait()
        self.memory.after_update()
        now_s = time.perf_counter()
        seconds = now_s - max(launched.started_s, self._finished_s)
        self._finished_s = now_s
        tokens = int(weight) if launched.counts_tokens and math.isfinite(weight) else 0
        progress.step = launched.step
        progress.cursor = launched.cursor
        progress.samples += len(launched.ids)
        progress.tokens += tokens
        has_loss = weight != 0  # without a token to learn the mean is NaN, and the weights are as before
        progress.loss = loss if has_loss else loss_before
        self.watchdog.note_update(seconds)
        self.saver.note_update(seconds)
        self.sample_log.write(progress.step, launched.epoch, launched.ids)
        metrics = numbers_of(launched.applied.metrics)
        self._report(launched, loss if has_loss else None, tokens, rate, seconds, metrics)
        update = Update(progress.step, loss if has_loss else math.nan, rate, tokens, progress.tokens, seconds, metrics)
        for notify in (self.task.report_update, self.task.after_update):
            if notify is not None:
                notify(update)
        if self.job.stop_on_not_finite and has_loss and not math.isfinite(loss):
            found = "NaN" if math.isnan(loss) else "infinite"
            before = "no previous step" if loss_before is None else f"previous loss {loss_before:.6g}"
            raise NotFiniteError(f"loss became {found} at step {progress.step} ({before}; learning rate {rate:.6g})")

    def _between_updates(self) -> None:
        """The work that needs the state of the last update, before the next begins."""
        self._run_autopsy()
        if self.progress.step == self._first_step:
            self.extras.state()  # the task's code may now return what cannot be stored
        if self.evaluation.is_due(self.progress.step, self.plan.steps) and not self.stop.requested:
            self.evaluation.validate(self.progress.step, self.plan.size)
        if self.task.milestone is not None and self._milestone_is_due(self.progress.step) and not self.stop.requested:
            self.watchdog.arm(CHECKPOINT_BOUND_S)
            with self.average.in_model():
                self.task.milestone(self.progress.step)
            self.watchdog.arm()
        self.commands.poll()
        if self.saver.is_due(self.progress.step):
            self._save(waiting=False)
        self.memory.start_peak()

    def _run_autopsy(self, *, more_updates: bool = True) -> None:
        """Serve an autopsy request. A stop that comes with it is for memory: save the work first."""
        autopsy = self.commands.autopsy
        if autopsy.requested and self.stop.requested:
            self._save(waiting=True)
        elif autopsy.requested and autopsy.is_due(self.progress.step):
            self.saver.settle()  # a checkpoint being written holds a copy of everything that is trained
        self.watchdog.arm(autopsy.bound_s)
        (autopsy.after_update if more_updates else autopsy.finish)(self.progress.step)

    def _resize(self) -> None:
        resize = self.commands.take_resize()
        if resize is None:
            return
        samples = length_of(self.task.dataset)
        if samples is not None and resize.effective_batch > samples:
            print(f"note: ignored resize: effective batch {resize.effective_batch} exceeds the dataset")
            return
        size = min(resize.batch_size, resize.effective_batch)
        self.plan = Plan(size, resize.effective_batch, self.plan.steps)
        self.facts["free"] |= {"batch.size": size, "batch.effective": resize.effective_batch}

    def _report(
        self,
        launched: _Launched,
        loss: float | None,
        tokens: int,
        rate: float,
        seconds: float,
        metrics: dict[str, float | None],
    ) -> None:
        """Report an update. In 15 of 16 reports `active_bytes` includes a part of the next update (measured: 6 MiB).

        The lowest of 16 consecutive ones is within 22 KiB of what is held between updates.
        """
        counters = self.memory.note_update()
        self.link.send(
            wire.Step,
            step=self.progress.step, loss=loss, tokens=tokens, samples=len(launched.ids),
            learning_rate=rate, seconds=seconds,
            batch_size=launched.size, accumulation=launched.accumulation,
            active_bytes=counters.active_bytes, cache_bytes=counters.cache_bytes, peak_bytes=counters.peak_bytes,
            resident_bytes=counters.resident_bytes, process_bytes=counters.process_bytes,
            dropped=self.link.dropped, metrics=metrics,
            device_limit_bytes=self.memory.device_limit_bytes, device_free_bytes=counters.device_free_bytes,
        )  # fmt: skip

    def _save(self, *, waiting: bool) -> bool:
        self.sample_log.flush()  # a checkpoint should not be ahead of it
        saved = self.saver.save(
            self.progress, self.source.epoch, self.facts, self.task, waiting=waiting, more=self.extras.state
        )
        if self.link.current_phase != "train":
            self.link.phase("train")
        return saved

    def _milestone_is_due(self, step: int) -> bool:
        every = self.task.milestone_every_steps
        return every > 0 and step % every == 0
