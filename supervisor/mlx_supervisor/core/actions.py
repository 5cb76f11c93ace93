"""What the machine wants done. An action that fails comes back as an `ActionFailed` event."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Field: TypeAlias = str | int | float | bool | None


class Severity(StrEnum):
    """How loud a notice is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True, slots=True)
class Spawn(Action):
    """Start a worker, `generation` being one more than any before it.

    `batch_size`: samples in memory at once; None leaves the choice to the worker (the task's own configuration).
    `effective_batch`: samples of one update; None likewise.
    `checkpoint_every_steps`: a tighter checkpoint interval than the settings', after a life that saved nothing.
    `mean_time_between_failures_s`: what the run has seen so far; the interval of checkpoints follows from it.
    `gradient_checkpointing`: compute activations again instead of keeping them.
    """

    generation: int
    batch_size: int | None
    effective_batch: int | None
    checkpoint_every_steps: int | None = None
    mean_time_between_failures_s: float | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class RequestClearCache(Action):
    """Ask the worker to clear its caches and say so (`Cleared`)."""

    generation: int


@dataclass(frozen=True, slots=True)
class RequestAutopsy(Action):
    """Ask the worker what grew (`Autopsied`), for at most `limit_s` seconds."""

    generation: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class RequestStop(Action):
    """Ask the worker to checkpoint after the update in hand, and exit."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class RequestResize(Action):
    """Ask the worker to go on with another number of samples in memory, from its next update."""

    generation: int
    batch_size: int
    effective_batch: int


@dataclass(frozen=True, slots=True)
class DumpStacks(Action):
    """Have the worker write every thread's stack to its stderr (before a hung one is killed)."""

    generation: int


@dataclass(frozen=True, slots=True)
class Terminate(Action):
    """SIGTERM to the worker."""

    generation: int


@dataclass(frozen=True, slots=True)
class Kill(Action):
    """SIGKILL to the worker's whole process group."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Notice(Action):
    """Append to the journal, the log and the display: something happened, in one sentence."""

    kind: str
    text: str
    severity: Severity = Severity.INFO
    generation: int = 0
    fields: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CloseGeneration(Action):
    """A life is over: its record for the journal and the summary.

    `alive`: its process can't be killed. The journal must not take it for gone: the next supervisor has to look for it.
    """

    generation: int
    record: Mapping[str, Field | list[str]]
    alive: bool = False


@dataclass(frozen=True, slots=True)
class SaveHistory(Action):
    """Make the run's history durable; it outlives the supervisor.

    `wait`: before anything else is done. Otherwise it may be late, or give way to a newer one.
    """

    snapshot: Mapping[str, object]
    wait: bool = True


@dataclass(frozen=True, slots=True)
class Finish(Action):
    """The run has ended for now: write the summary."""

    outcome: str
    reason: str
