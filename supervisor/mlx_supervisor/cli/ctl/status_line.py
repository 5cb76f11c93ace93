"""One line of `supervisorctl status`: Supervisord's three columns, then the progress and memory of training."""

from collections.abc import Mapping
from typing import Any

from mlx_supervisor.cli.time_left import time_left
from mlx_supervisor.core.words import counted, duration

NAME_WIDTH = 33
STATE_WIDTH = 10
"""Widths of Supervisord's columns, on which scripts rely."""
GAP = 3
ACTIVE_STATES = frozenset({10, 20, 30, 40})
UNREMARKABLE_STATES = frozenset({"train", "running"})
MIB = 1024.0 * 1024.0


def line(info: Mapping[str, Any], extra: Mapping[str, Any], width: int) -> str:
    """The line for one run. `info`: Supervisord's struct; `extra`: that of `training.getRunInfo`, or {} without one."""
    columns = f"{info['name']:<{width}}{info['statename']:<{STATE_WIDTH}}{info['description']}"
    details = ", ".join(details_of(extra)) if info["state"] in ACTIVE_STATES else ""
    return f"{columns}  {details}".rstrip()


def details_of(extra: Mapping[str, Any]) -> list[str]:
    """The known ones of: step, time left, losses, batch, gradient checkpointing, memory, leak, trips, wait."""
    parts = [
        _step(extra),
        time_left(extra.get("eta_s")),
        _loss("loss", extra.get("loss")),
        _loss("validation loss", extra.get("validation_loss")),
        _batch(extra),
        "gradient checkpointing" if extra.get("gradient_checkpointing") else "",
        _memory(extra),
        _leak(extra),
        _trips(extra),
        f"waiting for {extra['waiting_for']}" if extra.get("waiting_for") else "",
    ]
    return [part for part in parts if part]


def _step(extra: Mapping[str, Any]) -> str:
    step, target, state = extra.get("step"), extra.get("target_steps"), extra.get("phase")
    shown = "" if step is None else f"step {step:.0f}/{target:.0f}" if target else f"step {step:.0f}"
    if state and state not in UNREMARKABLE_STATES:
        return f"{shown} ({state})".lstrip()
    return shown


def _loss(name: str, loss: Any) -> str:
    if loss is None:
        return ""
    return f"{name} {loss:.4g}" if isinstance(loss, int | float) else f"{name} {loss}"


def _batch(extra: Mapping[str, Any]) -> str:
    size, accumulation = extra.get("batch_size"), extra.get("accumulation")
    if not size:
        return ""
    return f"batch {size:.0f}×{accumulation:.0f}" if accumulation and accumulation > 1 else f"batch {size:.0f}"


def _memory(extra: Mapping[str, Any]) -> str:
    used, limit = extra.get("footprint_bytes"), extra.get("limit_bytes")
    if used is None:
        return ""
    return f"memory {_size(used)} of {_size(limit)}" if limit else f"memory {_size(used)}"


def _size(value_bytes: float) -> str:
    mib = value_bytes / MIB
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def _leak(extra: Mapping[str, Any]) -> str:
    if not extra.get("leak"):
        return ""  # growth alone is not a leak: it may be the warm-up
    slope, steps, seconds = (extra.get(key) for key in ("leak_bytes_per_step", "steps_to_limit", "seconds_to_limit"))
    shown = f"leak {slope / MIB:.1f} MiB/step" if slope else "leak"
    if steps is not None:
        shown += f", limit in {steps:,.0f} step{'s' if round(steps) != 1 else ''}"
        shown += "" if seconds is None else f" ({duration(seconds)})"
    return shown


def _trips(extra: Mapping[str, Any]) -> str:
    trips, breaker = extra.get("trips"), extra.get("breaker")
    parts = [counted(int(trips), "trip")] if trips else []
    if breaker and breaker != "closed":
        parts.append(f"breaker {breaker}")
    return ", ".join(parts)
