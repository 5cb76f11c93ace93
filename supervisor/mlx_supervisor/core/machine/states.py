"""The states of a run."""

from enum import StrEnum


class State(StrEnum):
    """The state of a run."""

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
TRAINING = frozenset({S.RUNNING, S.RELIEVING})
