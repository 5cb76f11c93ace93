"""Validation between updates, and the test at the end."""

import time
from collections.abc import Callable
from typing import Any

from mlx_supervisor import wire
from mlx_worker.checkpoint import rng_state
from mlx_worker.checkpoint.saver import CHECKPOINT_BOUND_S, Saver
from mlx_worker.extras.ema import WeightAverage
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.hang_watchdog import HangWatchdog
from mlx_worker.task import EvaluationContext, Task
from mlx_worker.training.commands import Commands
from mlx_worker.training.metrics import loss_and_metrics, text_of

TEXT_LIMIT = 4096
"""Characters of a test's sentence that are reported."""


class _StopEvaluationError(Exception):
    """Raised inside an evaluation when a stop was requested."""


class Evaluation:
    """Evaluates the task's model, with the averaged weights if there are any.

    Training draws the same random numbers with and without evaluations.
    """

    def __init__(
        self,
        job: wire.Job,
        task: Task,
        commands: Commands,
        memory: CachePolicy,
        watchdog: HangWatchdog,
        saver: Saver,
        average: WeightAverage,
    ) -> None:
        self._average = average
        self._seed = job.seed
        self._task, self._commands, self._memory, self._watchdog, self._saver = task, commands, memory, watchdog, saver
        self._link, self._stop = commands.link, commands.stop
        self._step = 0

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the task has a validation after update `step` of `steps`."""
        every = self._task.evaluate_every_steps
        return every > 0 and (step % every == 0 or step == steps)

    def validate(self, step: int, batch_size: int) -> None:
        """Validate after update `step`, with micro-batches of `batch_size`; report the loss."""
        if self._task.evaluate is None:
            return
        started_s = time.perf_counter()
        found = self._evaluate(self._task.evaluate, step, batch_size)
        if found is None and self._stop.requested:
            detail = "validation interrupted by a stop"
        else:
            loss, metrics = loss_and_metrics(found, "Task.evaluate")
            detail = f"validation loss {loss:.4f} at step {step}{text_of(metrics)}"
            print(detail)
            self._link.send(wire.Validation, step=step, loss=loss, metrics=metrics)
            self._saver.note_evaluation(step, loss)
            if self._task.after_evaluation is not None:
                self._task.after_evaluation(step, loss, time.perf_counter() - started_s)
        self._link.phase("train", detail)
        self._watchdog.arm()

    def test(self, step: int, batch_size: int) -> None:
        """Run the task's test, if it has one, after the last update."""
        if self._task.test is None:
            return
        found = self._evaluate(self._task.test, step, batch_size)
        if not found:
            print("test interrupted by a stop" if self._stop.requested else "the test gave no result")
            return
        text, loss = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        print(text)
        self._link.send(wire.Tested, text=str(text)[:TEXT_LIMIT], loss=None if loss is None else float(loss))

    def _evaluate(self, evaluate: Callable[[Any, EvaluationContext], Any], step: int, batch_size: int) -> Any:
        """What `evaluate` returns; None after a stop. The random generators are restored."""
        state = rng_state.capture()
        rng_state.seed_generators(self._seed)
        self._step = step
        self._link.phase("eval", f"step {step}")
        self._watchdog.arm(CHECKPOINT_BOUND_S)
        self._task.model.eval()
        try:
            with self._average.in_model():
                context = EvaluationContext(batch_size, self._progress, self._memory.clears)
                result = evaluate(self._task.model, context)
        except _StopEvaluationError:
            result = None
        self._task.model.train()
        rng_state.restore(state)
        self._memory.after_update()
        return result

    def _progress(self) -> None:
        self._commands.poll()
        self._memory.note_evaluated()
        self._link.phase("eval", f"step {self._step}")
        self._watchdog.arm(CHECKPOINT_BOUND_S)
        if self._stop.requested:
            raise _StopEvaluationError
