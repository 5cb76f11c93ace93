"""How quantities are written for people."""

from mlx_supervisor.core.policy import MIB


def duration(seconds: float) -> str:
    """`0.25 s` (below 1 s), `2.5 s` (below 10 s), `45 s`, `2m10s`, `8:00:00` (from one hour)."""
    if seconds < 9.95:
        return f"{round(seconds, 1 if seconds >= 1 else 2):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."
