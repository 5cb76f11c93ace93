"""The machine's output. A failed action results in an `ActionFailed` event."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Field: TypeAlias = str | int | float | bool | None


class Severity(StrEnum):
    """How serious a notice is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True, slots=True)
class Spawn(Action):
    """Start a worker; `generation` is one more than the highest before it.

    `batch_size`: the micro-batch in samples; None leaves the choice to the worker (the task's own configuration).
    `effective_batch`: samples of one update; None likewise.
    `checkpoint_every_steps`: a shorter checkpoint interval than the settings', after a generation that saved none.
    `mean_time_between_failures_s`: of the run so far; the checkpoint interval follows from it.
    `gradient_checkpointing`: recompute activations instead of keeping them.
    """

    generation: int
    batch_size: int | None
    effective_batch: int | None
    checkpoint_every_steps: int | None = None
    mean_time_between_failures_s: float | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class RequestClearCache(Action):
    """Request the worker to clear its caches; it answers with `Cleared`."""

    generation: int


@dataclass(frozen=True, slots=True)
class RequestAutopsy(Action):
    """Request an autopsy of at most `limit_s` seconds; the worker answers with `Autopsied`."""

    generation: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class RequestStop(Action):
    """Request the worker to finish the current update, save a checkpoint and exit.

    `waits`: on a full or failing disk it may wait until the checkpoint is saved; otherwise it exits within the grace
    period.
    """

    generation: int
    reason: str
    waits: bool = False


@dataclass(frozen=True, slots=True)
class RequestResize(Action):
    """Request another micro-batch from the worker's next update."""

    generation: int
    batch_size: int
    effective_batch: int


@dataclass(frozen=True, slots=True)
class DumpStacks(Action):
    """Make the worker write every thread's stack to its stderr, before a hung worker is killed."""

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
    """One sentence for the journal, the log and, unless it is `quiet`, the display."""

    kind: str
    text: str
    severity: Severity = Severity.INFO
    generation: int = 0
    fields: Mapping[str, Field] = field(default_factory=dict)
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class CloseGeneration(Action):
    """The end of a generation: its record for the journal and the summary.

    `alive`: a process survived SIGKILL. The journal keeps the generation open, so that the next supervisor checks it.
    """

    generation: int
    record: Mapping[str, Field | list[str]]
    alive: bool = False


@dataclass(frozen=True, slots=True)
class SaveHistory(Action):
    """Make the run's history durable; it survives the supervisor.

    `wait`: before any later action. Otherwise it may be written late, or be replaced by a newer snapshot.
    """

    snapshot: Mapping[str, object]
    wait: bool = True


@dataclass(frozen=True, slots=True)
class Finish(Action):
    """The run has ended: write the summary."""

    outcome: str
    reason: str
