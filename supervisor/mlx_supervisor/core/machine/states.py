"""Where a run can be."""

from enum import StrEnum


class State(StrEnum):
    """Where a run is."""

    STOPPED = "stopped"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    RELIEVING = "relieving"
    DRAINING = "draining"
    TERMINATING = "terminating"
    KILLING = "killing"
    BACKOFF = "backoff"
    COMPLETED = "completed"
    FATAL = "fatal"


S = State


AT_REST = frozenset({S.STOPPED, S.COMPLETED, S.FATAL})
