"""How quantities are written for people."""


def duration(seconds: float) -> str:
    """`0.5 s` (below 10 s), `45 s`, `2m10s`, `8:00:00` (from one hour)."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
