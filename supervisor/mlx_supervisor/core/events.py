"""The machine's input. Every event has its own time, `at_s`, in seconds of a monotonic clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What the worker is doing. Memory is judged differently in each phase."""

    LOAD = "load"
    TRAIN = "train"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"


class Outcome(StrEnum):
    """The outcome that a worker reports before it exits."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"


class MemoryPressure(StrEnum):
    """The operating system's memory pressure (macOS: pressure level; Linux: pressure stall information)."""

    NORMAL = "normal"
    WARN = "warn"
    CRITICAL = "critical"


class CommandKind(StrEnum):
    """Commands to one run. SUSPEND: a stop because the supervisor ends; the next one resumes the run."""

    START = "start"
    STOP = "stop"
    SUSPEND = "suspend"
    RESTART = "restart"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    at_s: float


@dataclass(frozen=True, slots=True)
class WorkerEvent(Event):
    """An event of one generation; events of other generations are ignored."""

    generation: int


@dataclass(frozen=True, slots=True)
class Command(Event):
    """A request by a person or by the daemon."""

    kind: CommandKind
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The deadline of `next_deadline` has passed. An early tick is ignored."""


@dataclass(frozen=True, slots=True)
class Paused(Event):
    """The supervisor itself did not run for `seconds`: the machine or its container was paused, or a call blocked."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ActionFailed(Event):
    """An action failed. `action`: "spawn", or the action's class name.

    `passing`: a later attempt may succeed (a full disk, no process available).
    """

    action: str
    error: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class StartBlocked(WorkerEvent):
    """Another process holds the run's folder: the worker starts once it has ended. `reason` is a part of a sentence.

    `lasting`: it could not be ended, and must be ended by a person.
    """

    reason: str
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Spawned(WorkerEvent):
    """The process exists, but is not ready yet."""

    pid: int


@dataclass(frozen=True, slots=True)
class DeviceFound(WorkerEvent):
    """The worker computes on a device with its own memory. `limit_bytes`: what this run may hold of it.

    `uuid`: as the driver names the device, "" if unknown.
    """

    total_bytes: int
    limit_bytes: int
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class DeviceSample(WorkerEvent):
    """The device's memory by its driver. `used_bytes`: of the worker's process group; None: the driver can't tell."""

    used_bytes: int | None
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Ready(WorkerEvent):
    """The model is loaded and the checkpoint restored: steps follow.

    `batch_size`: the micro-batch; `effective_batch`: samples of one update. `skipped`: skipped checkpoints, with
    the reason. `requested_size`, `requested_effective`: what the task requests now; None: unknown.
    """

    step: int
    target_steps: int
    batch_size: int
    effective_batch: int
    checkpoint: str | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    can_checkpoint_gradients: bool = False
    requested_size: int | None = None
    requested_effective: int | None = None


@dataclass(frozen=True, slots=True)
class StepReport(WorkerEvent):
    """One optimizer update. Memory in bytes, as MLX counts it.

    `loss`: None if the update has no token to learn. `metrics`: the task's own; None: not a finite number.
    `process_bytes`: the footprint of the worker alone at the end of the update, as it reads it itself; 0: unknown.
    `peak_bytes`: the highest active memory of the update. `device_limit_bytes`: the limit on a device with its own
    memory, which these counters are of; 0: they are of the machine's memory. `device_free_bytes`: what all processes
    leave of it; None: unknown.
    """

    step: int
    loss: float | None
    tokens: int
    samples: int
    learning_rate: float
    seconds: float
    batch_size: int
    accumulation: int
    active_bytes: int
    cache_bytes: int
    phase: Phase = Phase.TRAIN
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    process_bytes: int = 0
    peak_bytes: int = 0
    device_limit_bytes: int = 0
    device_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PhaseChange(WorkerEvent):
    """The worker entered a phase, or reports progress within it.

    `waiting_for`: what it lacks to save or export its finished work, for example room on the disk.
    """

    phase: Phase
    detail: str = ""
    waiting_for: str = ""


@dataclass(frozen=True, slots=True)
class ValidationReport(WorkerEvent):
    """The validation loss after update `step`, and the evaluation's other figures."""

    step: int
    loss: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tested(WorkerEvent):
    """The result of the test after the last update, as a sentence. `loss`: where the test gives a number."""

    text: str
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointReport(WorkerEvent):
    """A checkpoint is durable (`ok`), or failed, and training continues without it.

    `notes`: what else happened to the checkpoint folder, a sentence each.
    """

    step: int
    ok: bool
    seconds: float
    stall_s: float
    size_bytes: int
    error: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cleared(WorkerEvent):
    """The worker's answer to a request to clear its caches."""

    active_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of a worker: its dotted type, the first line of its message, and where the user's code raised it.

    Without a known place, `file` is "" and `line` 0. `function` is "" where none is known (a syntax error).
    """

    kind: str
    message: str = ""
    file: str = ""
    line: int = 0
    function: str = ""

    @property
    def name(self) -> str:
        """The type's name without its module."""
        return self.kind.rpartition(".")[2]

    @property
    def place(self) -> str:
        """`train.py:58 in step`, or "" if unknown."""
        place = f"{self.file.rpartition('/')[2]}:{self.line}" if self.file else ""
        return f"{place} in {self.function}" if place and self.function else place


@dataclass(frozen=True, slots=True)
class Bye(WorkerEvent):
    """The worker's last message; the exit status has the final say. `errors`: what ended it, then what led to that.

    `lost`: what a stopped worker could not save or export, "" if nothing. `exported`: the folder of a completed run's
    result, "" if there is none. `device_held_bytes`, `device_free_bytes`: of a device with its own memory, when an
    error ended the worker: what MLX held, and what all processes left; None: unknown. `target_steps`: of the run, 0:
    unknown.
    """

    outcome: Outcome
    reason: str
    step: int
    loss: float | None
    weights_sha256: str | None
    errors: tuple[Raised, ...] = ()
    lost: str = ""
    exported: str = ""
    device_held_bytes: int | None = None
    device_free_bytes: int | None = None
    target_steps: int = 0


@dataclass(frozen=True, slots=True)
class Sample(WorkerEvent):
    """Memory as the operating system charges it to the worker's whole process group, and the machine's own.

    `children_bytes`: the part of the footprint outside the group leader. `available_bytes`: of the machine, or of the
    supervisor's control group.
    """

    footprint_bytes: int
    available_bytes: int
    processes: int
    children_bytes: int = 0
    pressure: MemoryPressure = MemoryPressure.NORMAL


@dataclass(frozen=True, slots=True)
class MachineSample(Event):
    """The machine's memory while the run has no worker. `device_free_bytes`: of the device that its last worker used;
    None: unknown."""

    available_bytes: int
    pressure: MemoryPressure = MemoryPressure.NORMAL
    device_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Autopsied(WorkerEvent):
    """An autopsy: what grew, one sentence each, the largest first."""

    step: int
    findings: tuple[str, ...]
    seconds: float
    complete: bool = True


@dataclass(frozen=True, slots=True)
class SampleMissing(WorkerEvent):
    """A memory sample failed. Never treated as zero."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exited(WorkerEvent):
    """The worker was reaped, and its process group is empty.

    Exactly one of `exit_code` and `signal` is set; neither if the process was not the supervisor's child.
    `stderr_tail`: the end of its stderr, bounded by the adapter. `oom_killed`: whether the kernel counted an
    out-of-memory kill during this generation; None where it is unknown. `durable_step`: of the newest checkpoint on
    disk, which a killed worker may not have reported; 0 if there is none. `first_step`, `last_step`: the updates that
    the worker made by what it left on disk, heard or not; 0 for none, or unknown.
    """

    exit_code: int | None
    signal: int | None
    stderr_tail: str = ""
    oom_killed: bool | None = None
    durable_step: int = 0
    first_step: int = 0
    last_step: int = 0


@dataclass(frozen=True, slots=True)
class Recovered(WorkerEvent):
    """After a supervisor crash, its successor has ensured that this generation's worker is no longer running.

    From the journal: the generation's first and last step (0 for none), the batch, the seconds spent in steps
    (`train_s`), the seconds from its start to its last message (`uptime_s`), and the peak footprint sampled.
    """

    machine_restarted: bool
    first_step: int = 0
    last_step: int = 0
    batch_size: int | None = None
    accumulation: int | None = None
    train_s: float = 0.0
    uptime_s: float = 0.0
    peak_footprint_bytes: int = 0
