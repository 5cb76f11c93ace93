"""The line of a step, for logs and pipes."""

import time

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import duration, growth_rate

LEAK_SHOWN_BYTES = 0.05 * MIB
"""Less would read 0.0 MiB/step."""


def step_line(machine: Run, step: ev.StepReport) -> str:
    """One update in one line, with what is known of speed, memory, leak rate and time left."""
    sample = machine.last_sample
    leak = machine.breaker.growth.bytes_per_step
    used = "?" if sample is None else f"{sample.footprint_bytes / MIB:,.0f}"
    speed = machine.rate.speed(machine.history.target_steps)
    return (
        f"{time.strftime('%H:%M:%S')} step {step.step}/{machine.history.target_steps} loss={step.loss:.4f} "
        f"lr={step.learning_rate:.3g}{f' {speed.unit}/s={speed.per_s:,.0f}' if speed else ''} "
        f"batch={step.batch_size}x{step.accumulation} "
        f"memory={used}/{machine.policy.memory.limit_bytes / MIB:,.0f} MiB"
        f"{f' leak={growth_rate(leak)}' if leak is not None and leak >= LEAK_SHOWN_BYTES else ''}"
        f"{f' left={duration(speed.left_s)}' if speed and speed.left_s else ''}"
    )
