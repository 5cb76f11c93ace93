"""One line of `supervisorctl status`: Supervisord's three columns, then the progress and memory of training."""

from collections.abc import Mapping
from typing import Any

from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import counted, duration, figures, growth_rate, loss_text, mebibytes, validation_text
from mlx_supervisor.host.time_left import time_left

NAME_WIDTH = 33
STATE_WIDTH = 10
"""Widths of Supervisord's columns, on which scripts rely."""
GAP = 3
ACTIVE_STATES = frozenset({10, 20, 30, 40})
UNREMARKABLE = frozenset({"train", "running", "training"})
"""States and activities that go without saying."""


def line(info: Mapping[str, Any], extra: Mapping[str, Any], width: int) -> str:
    """The line for one run. `info`: Supervisord's struct; `extra`: that of `training.getRunInfo`, or {} without one."""
    columns = f"{info['name']:<{width}}{info['statename']:<{STATE_WIDTH}}{info['description']}"
    details = ", ".join(details_of(extra)) if info["state"] in ACTIVE_STATES else ""
    return f"{columns}  {details}".rstrip()


def details_of(extra: Mapping[str, Any]) -> list[str]:
    """What is known of the step, what it does, speed, time left, losses, batch, memory, leak, trips, restarts."""
    parts = [
        _step(extra),
        f"{extra['tokens_per_s']:,.0f} tokens/s" if extra.get("tokens_per_s") else "",
        time_left(extra.get("eta_s")),
        _loss(extra),
        _validation(extra),
        ", ".join(figures(extra.get("metrics") or {})),
        _batch(extra),
        "gradient checkpointing" if extra.get("gradient_checkpointing") else "",
        _memory(extra),
        _device(extra),
        _leak(extra),
        _trips(extra),
        f"waiting for {extra['waiting_for']}" if extra.get("waiting_for") else "",
    ]
    return [part for part in parts if part]


def _step(extra: Mapping[str, Any]) -> str:
    step, target, state = extra.get("step"), extra.get("target_steps"), extra.get("activity") or extra.get("phase")
    shown = "" if step is None else f"step {step:.0f}/{target:.0f}" if target else f"step {step:.0f}"
    if state and state not in UNREMARKABLE:
        return f"{shown} ({state})".lstrip()
    return shown


def _loss(extra: Mapping[str, Any]) -> str:
    loss, smoothed = extra.get("loss"), extra.get("smoothed_loss")
    if loss is None:
        return ""
    return f"loss {_number(loss)}" + ("" if smoothed is None else f" (smoothed {_number(smoothed)})")


def _validation(extra: Mapping[str, Any]) -> str:
    loss, step, best = (extra.get(key) for key in ("validation_loss", "validation_step", "best_validation_loss"))
    if loss is None or step is None:
        return "" if loss is None else f"validation loss {_number(loss)}"
    best_step = extra.get("best_validation_step") or 0
    if isinstance(loss, str):  # not finite: sent as text
        return f"validation loss {loss} at step {step:.0f}"
    return f"validation loss {validation_text(loss, round(step), best, round(best_step))}"


def _number(loss: Any) -> str:
    return loss_text(loss) if isinstance(loss, int | float) else str(loss)


def _batch(extra: Mapping[str, Any]) -> str:
    size, accumulation = extra.get("batch_size"), extra.get("accumulation")
    if not size:
        return ""
    return f"batch {size:.0f}×{accumulation:.0f}" if accumulation and accumulation > 1 else f"batch {size:.0f}"


def _memory(extra: Mapping[str, Any]) -> str:
    used, limit = extra.get("footprint_bytes"), extra.get("limit_bytes")
    if used is None:
        return ""
    if not limit:
        return f"memory {_size(used)}"
    shown = _size(used), _size(limit)
    if shown[0] == shown[1] and used != limit:
        numbers = mebibytes(used, limit)
        shown = f"{numbers[0]} MiB", f"{numbers[1]} MiB"
    return f"memory {shown[0]} of {shown[1]}"


def _device(extra: Mapping[str, Any]) -> str:
    used, limit = extra.get("device_used_bytes"), extra.get("device_limit_bytes")
    return "" if used is None or not limit else f"device {_size(used)} of {_size(limit)}"


def _size(value_bytes: float) -> str:
    mib = value_bytes / MIB
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def _leak(extra: Mapping[str, Any]) -> str:
    if not extra.get("leak"):
        return ""  # growth alone is not a leak: it may be the warm-up
    slope, steps, seconds = (extra.get(key) for key in ("leak_bytes_per_step", "steps_to_limit", "seconds_to_limit"))
    shown = f"leak {growth_rate(slope)}" if slope else "leak"
    if steps is not None:
        shown += f", limit in {counted(round(steps), 'step')}"
        shown += "" if seconds is None else f" ({duration(seconds)})"
    return shown


def _trips(extra: Mapping[str, Any]) -> str:
    breaker = extra.get("breaker")
    parts = [counted(int(extra[key]), key.removesuffix("s")) for key in ("trips", "restarts") if extra.get(key)]
    if breaker and breaker != "closed":
        parts.append(f"breaker {breaker}")
    return ", ".join(parts)
