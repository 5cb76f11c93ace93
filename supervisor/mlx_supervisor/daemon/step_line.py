"""The line of a step, for logs and pipes."""

import time

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.memory.device import first_to_limit
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import figures, growth_rate, loss_text, mebibytes, remaining
from mlx_supervisor.host.time_left import done_at

WIDTH_CHARS = 135
"""A longer line leaves out the time of day at the end, and so do all lines after it."""
LEAK_SHOWN_BYTES = 0.05 * MIB
"""Less would read 0.0 MiB/step."""
GIBIBYTES_FROM_BYTES = 10 * 1024 * MIB


def step_line(machine: Run, step: ev.StepReport, left_out: set[str] | None = None) -> str:
    """One update in one line, with what is known of speed, memory, leak rate, restarts and time left.

    `left_out`: names of the fields that earlier lines left out; so does this one, and adds its own.
    """
    left_out = set() if left_out is None else left_out
    history, sample = machine.history, machine.last_sample
    leak, smoothed = first_to_limit(machine.device, machine.breaker.growth).bytes_per_step, history.smoothed_loss
    speed = machine.rate.speed(history.target_steps)
    parts = {
        "step": f"{time.strftime('%H:%M:%S')} step {step.step}/{history.target_steps}",
        "loss": "no tokens" if step.loss is None else f"loss={loss_text(step.loss)}",
        "smoothed": "" if smoothed is None else f"smoothed={loss_text(smoothed)}",
        "lr": f"lr={step.learning_rate:.3g}",
        "metrics": " ".join(figures(step.metrics)),
        "speed": f"{speed.unit}/s={speed.per_s:,.0f}" if speed else "",
        "batch": f"batch={step.batch_size}x{step.accumulation}",
        "memory": _memory(None if sample is None else sample.footprint_bytes, machine.policy.memory.limit_bytes),
        "device": _device(machine),
        "leak": f"leak={growth_rate(leak)}" if leak is not None and leak >= LEAK_SHOWN_BYTES else "",
        "restarts": f"restarts={history.restarts}" if history.restarts else "",
        "left": f"{remaining(speed.left_s)} left" if speed and speed.left_s else "",
        "done": f"done about {done_at(speed.left_s)}" if speed and speed.left_s else "",
    }
    if len(_joined(parts)) > WIDTH_CHARS:
        left_out.add("done")
    return _joined({name: text for name, text in parts.items() if name not in left_out})


def _joined(parts: dict[str, str]) -> str:
    until = [parts[name] for name in ("left", "done") if parts.get(name)]
    figures_shown = " ".join(text for name, text in parts.items() if text and name not in ("left", "done"))
    return ", ".join([figures_shown, *until])


def _device(machine: Run) -> str:
    device = machine.device
    return _memory(device.used_bytes, device.limit_bytes).replace("memory", "device") if device.limit_bytes else ""


def _memory(used_bytes: int | None, limit_bytes: int) -> str:
    if used_bytes is not None and limit_bytes >= GIBIBYTES_FROM_BYTES and used_bytes >= 1024 * MIB:
        return f"memory={used_bytes / MIB / 1024:.1f}/{limit_bytes / MIB / 1024:.1f} GiB"
    shown = ["?", *mebibytes(limit_bytes)] if used_bytes is None else mebibytes(used_bytes, limit_bytes)
    return f"memory={'/'.join(shown)} MiB"
