"""The time until a run is done, for people."""

import time

from mlx_supervisor.core.words import duration

DAY_S = 24 * 3600


def time_left(seconds: float | None) -> str:
    """`2m10s left, done about 20:49`, with the date from one day on; "" while unknown and at the end."""
    if not seconds:
        return ""
    done = time.localtime(time.time() + min(seconds, 1e9))
    return f"{duration(seconds)} left, done about {time.strftime('%H:%M' if seconds < DAY_S else '%d %b %H:%M', done)}"
