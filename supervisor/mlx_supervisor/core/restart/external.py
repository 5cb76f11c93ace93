"""Workers that other processes kill or stop: how often that is answered with another start.

Such a death says nothing against the run, so it is no generation without progress. Its budget is a rate: at most
`restart.max_external` starts within an hour, then the next one waits until the hour has room again.
"""

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory

EXTERNAL_CAUSES = frozenset({Cause.KILLED, Cause.INTERRUPTED})
WINDOW_S = 3600.0
HOURS_AT_MOST = 24
"""After as many deaths without a new checkpoint as this many hours allow, the run fails."""


def note(past: RunHistory, at_s: float, at_most: int) -> str | None:
    """Count a death without a new checkpoint; returns why to give up, or None. `at_most`: within an hour."""
    past.external_s = [*recent(past, at_s), at_s][-at_most:]
    past.external_without_progress += 1
    if past.external_without_progress < HOURS_AT_MOST * at_most:
        return None
    return (
        f"other processes ended {past.external_without_progress} consecutive generations without a new checkpoint "
        f"(restart.max_external = {at_most} an hour, for {HOURS_AT_MOST} hours)"
    )


def recent(past: RunHistory, at_s: float) -> list[float]:
    """The deaths of the last hour. A time in the future is of a clock before the machine restarted."""
    return [each for each in past.external_s if at_s - WINDOW_S < each <= at_s]


def wait_s(past: RunHistory, at_s: float, at_most: int) -> float:
    """Seconds until the hour has room for another start; 0 if it has."""
    deaths = recent(past, at_s)
    return 0.0 if len(deaths) < at_most else deaths[-at_most] + WINDOW_S - at_s


def text(past: RunHistory, at_s: float, at_most: int) -> str:
    """How often it happened, for the notice of a restart; "" the first time."""
    count = len(recent(past, at_s))
    if count < 2:
        return ""
    spent = ", which is spent" if count >= at_most else ""
    return f" ({count} times within an hour; restart.max_external = {at_most}{spent})"
