"""The time until a run is done, with the local time of day at its end."""

import time

from mlx_supervisor.core.words import remaining

DAY_S = 24 * 3600


def time_left(seconds: float | None) -> str:
    """`2 min left, done about 20:49`, with the date from one day on; "" while unknown and at the end."""
    return f"{remaining(seconds)} left, done about {done_at(seconds)}" if seconds else ""


def done_at(seconds: float) -> str:
    """The time of day in so many seconds: `20:49`, from one day on `05 Mar 22:47`."""
    done = time.localtime(time.time() + min(seconds, 1e9))
    return time.strftime("%H:%M" if seconds < DAY_S else "%d %b %H:%M", done)
