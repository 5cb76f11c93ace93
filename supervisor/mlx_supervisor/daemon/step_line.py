"""The line of a step, for logs and pipes."""

import time

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import figures, growth_rate, mebibytes
from mlx_supervisor.host.time_left import time_left

LEAK_SHOWN_BYTES = 0.05 * MIB
"""Less would read 0.0 MiB/step."""


def step_line(machine: Run, step: ev.StepReport) -> str:
    """One update in one line, with what is known of speed, memory, leak rate, restarts and time left."""
    history, sample = machine.history, machine.last_sample
    leak, smoothed = machine.breaker.growth.bytes_per_step, history.smoothed_loss
    speed = machine.rate.speed(history.target_steps)
    parts = [
        f"{time.strftime('%H:%M:%S')} step {step.step}/{history.target_steps} loss={step.loss:.4f}",
        "" if smoothed is None else f"smoothed={smoothed:.4f}",
        f"lr={step.learning_rate:.3g}",
        *figures(step.metrics),
        f"{speed.unit}/s={speed.per_s:,.0f}" if speed else "",
        f"batch={step.batch_size}x{step.accumulation}",
        f"memory={_memory(None if sample is None else sample.footprint_bytes, machine.policy.memory.limit_bytes)} MiB",
        f"leak={growth_rate(leak)}" if leak is not None and leak >= LEAK_SHOWN_BYTES else "",
        f"restarts={history.restarts}" if history.restarts else "",
    ]
    left = time_left(speed.left_s) if speed else ""
    return ", ".join(filter(None, (" ".join(filter(None, parts)), left)))


def _memory(used_bytes: int | None, limit_bytes: int) -> str:
    if used_bytes is None:
        return f"?/{mebibytes(limit_bytes)[0]}"
    return "/".join(mebibytes(used_bytes, limit_bytes))
