"""The line of a step, for logs and pipes."""

import time

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run


def step_line(machine: Run, step: ev.StepReport) -> str:
    """One update in one line, with the footprint, the limit and the leak rate."""
    mib = 1024 * 1024
    sample = machine.last_sample
    leak = machine.breaker.growth.bytes_per_step
    used = "?" if sample is None else f"{sample.footprint_bytes / mib:,.0f}"
    unit, count = ("tokens", step.tokens) if step.tokens else ("samples", step.samples)
    rate = count / step.seconds if step.seconds > 0 else 0.0
    return (
        f"{time.strftime('%H:%M:%S')} step {step.step}/{machine.history.target_steps} loss={step.loss:.4f} "
        f"lr={step.learning_rate:.3g} {unit}/s={rate:,.0f} batch={step.batch_size}x{step.accumulation} "
        f"memory={used}/{machine.policy.memory.limit_bytes / mib:,.0f} MiB "
        f"leak={'?' if leak is None else f'{leak / mib:.1f}'} MiB/step"
    )
