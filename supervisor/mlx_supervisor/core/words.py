"""How quantities are written for people."""

from collections.abc import Mapping
from math import isfinite

from mlx_supervisor.core.policy import MIB

DECIMALS_BELOW_BYTES = 10 * 1024 * MIB
"""Two memory figures below this that would look equal get decimals."""
METRICS_SHOWN = 6
METRIC_NAME_SHOWN = 24
"""Characters of a metric's name in a line."""


def duration(seconds: float) -> str:
    """`0.25 s` (below 1 s), `2.5 s` (below 10 s), `45 s`, `2m10s`, `8:00:00` (from one hour)."""
    if seconds < 9.95:
        return f"{round(seconds, 1 if seconds >= 1 else 2):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def remaining(seconds: float) -> str:
    """Rounded, for an estimate: `45 s`, `2 min` (from one minute), `1 h 20 min`, `3 d 4 h` (from one day)."""
    if seconds < 60:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    hours, minutes_rest = divmod(minutes, 60)
    days, hours_rest = divmod(hours, 24)
    if hours == 0:
        return f"{minutes} min"
    first, second = ((days, "d"), (hours_rest, "h")) if days else ((hours, "h"), (minutes_rest, "min"))
    return f"{first[0]:,} {first[1]}" + (f" {second[0]} {second[1]}" if second[0] else "")


def mebibytes(*sizes_bytes: float) -> list[str]:
    """Numbers of MiB, whole unless two of them would look equal though they are not: `165.3` and `165.0`."""
    decimals = 0
    if len(set(sizes_bytes)) > 1 and max(sizes_bytes) < DECIMALS_BELOW_BYTES:
        while decimals < 2 and len({f"{each / MIB:.{decimals}f}" for each in sizes_bytes}) < len(set(sizes_bytes)):
            decimals += 1
    return [f"{each / MIB:,.{decimals}f}" for each in sizes_bytes]


def used_of(used_bytes: float, limit_bytes: float) -> str:
    """`used 165.3 MiB, limit 165.0`."""
    used, limit = mebibytes(used_bytes, limit_bytes)
    return f"used {used} MiB, limit {limit}"


def loss_text(loss: float) -> str:
    """Four significant digits: `2.308`, `2.31`; `NaN`, `infinite`."""
    if not isfinite(loss):
        return "NaN" if loss != loss else "infinite" if loss > 0 else "-infinite"
    return f"{loss:.4g}"


def validation_text(loss: float, step: int, best_loss: float | None, best_step: int) -> str:
    """`2.31 at step 40 (best 2.28 at step 30)`, or `2.28 at step 30 (best)`."""
    text = f"{loss_text(loss)} at step {step}"
    if best_loss is None:
        return text
    return f"{text} (best)" if best_step == step else f"{text} (best {loss_text(best_loss)} at step {best_step})"


def size(size_bytes: float) -> str:
    """`165.3 MiB`, `1,700 MiB`, `128 GiB` (from 100 GiB)."""
    mib = size_bytes / MIB
    number, unit = (mib / 1024, "GiB") if mib >= 100 * 1024 else (mib, "MiB")
    return f"{number:,.1f}".removesuffix(".0") + f" {unit}"


def growth_rate(bytes_per_step: float) -> str:
    """`52.7 MiB/step`."""
    return f"{bytes_per_step / MIB:.1f} MiB/step"


def counted(number: int, noun: str) -> str:
    """`1 trip`, `2 trips`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shortened(text: str, limit_chars: int) -> str:
    """At most `limit_chars`; what is in brackets at the end, such as a file and line, is kept where it fits."""
    if len(text) <= limit_chars:
        return text
    start = text.rfind(" (") if text.endswith(")") else -1
    tail = text[start:] if start > 0 and len(text) - start < limit_chars // 2 else ""
    return f"{text[: limit_chars - len(tail) - 1].rstrip()}…{tail}"


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def figures(metrics: Mapping[str, float | None]) -> list[str]:
    """The first of a task's own metrics: `accuracy=0.9123`; `=nan` for a value that is not a finite number."""
    shown = list(metrics.items())[:METRICS_SHOWN]
    return [f"{name[:METRIC_NAME_SHOWN]}={'nan' if value is None else f'{value:.4g}'}" for name, value in shown]
