"""What the machine is told. Every event carries its own time, `at_s`, in seconds of a monotonic clock."""

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What the worker is doing; memory means something different in each."""

    LOAD = "load"
    TRAIN = "train"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"


class Outcome(StrEnum):
    """How a worker says that its life ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"


class MemoryPressure(StrEnum):
    """How the operating system judges the machine's memory (macOS: its pressure level; Linux: stall information)."""

    NORMAL = "normal"
    WARN = "warn"
    CRITICAL = "critical"


class CommandKind(StrEnum):
    """What can be asked of one run. SUSPEND is a stop because the supervisor itself ends: the run is still wanted."""

    START = "start"
    STOP = "stop"
    SUSPEND = "suspend"
    RESTART = "restart"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events: when it happened."""

    at_s: float


@dataclass(frozen=True, slots=True)
class WorkerEvent(Event):
    """An event about one incarnation of the worker; older generations are ignored."""

    generation: int


@dataclass(frozen=True, slots=True)
class Command(Event):
    """A person's wish."""

    kind: CommandKind
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The deadline that `next_deadline` named has come (or time merely passed)."""


@dataclass(frozen=True, slots=True)
class ActionFailed(Event):
    """The world refused an action of ours: `action` is "spawn", or its class's name.

    `passing`: it may be otherwise later (a full disk, no process to be had).
    """

    action: str
    error: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Spawned(WorkerEvent):
    """The process exists; it is not ready."""

    pid: int


@dataclass(frozen=True, slots=True)
class Ready(WorkerEvent):
    """The model is loaded, the checkpoint restored: the next thing is a step.

    `batch_size` is what is in memory at once, in samples; `effective_batch` the samples of one update.
    """

    step: int
    target_steps: int
    batch_size: int
    effective_batch: int
    checkpoint: str | None = None
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    can_checkpoint_gradients: bool = False


@dataclass(frozen=True, slots=True)
class StepReport(WorkerEvent):
    """One optimizer update. Memory in bytes, as MLX counts it; `resident_bytes` as the worker sees itself."""

    step: int
    loss: float
    tokens: int
    samples: int
    learning_rate: float
    seconds: float
    batch_size: int
    accumulation: int
    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    resident_bytes: int
    phase: Phase = Phase.TRAIN


@dataclass(frozen=True, slots=True)
class PhaseChange(WorkerEvent):
    """The worker went on to something else, or says where it stands in it (which counts as progress)."""

    phase: Phase
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointReport(WorkerEvent):
    """A checkpoint is durable (`ok`), or could not be written and the run goes on without it."""

    step: int
    ok: bool
    seconds: float
    stall_s: float
    size_bytes: int
    error: str = ""


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
    """The worker's last message; the exit status has the final say. `errors`: what ended it, then what led to that."""

    outcome: Outcome
    reason: str
    step: int
    loss: float | None
    weights_sha256: str | None
    errors: tuple[Raised, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample(WorkerEvent):
    """Memory as the operating system charges it to the worker's whole process group, and the machine's own.

    `children_bytes`: the part of the footprint that is not the leader's. `available_bytes`: what the machine, or the
    control group that we live in, can still give. `swap_used_bytes`: None where it can't be told.
    """

    footprint_bytes: int
    available_bytes: int
    processes: int
    children_bytes: int = 0
    swap_used_bytes: int | None = None
    pressure: MemoryPressure = MemoryPressure.NORMAL


@dataclass(frozen=True, slots=True)
class MachineSample(Event):
    """The machine's memory while a run waits for it to come back, with no worker of its own."""

    available_bytes: int
    pressure: MemoryPressure = MemoryPressure.NORMAL


@dataclass(frozen=True, slots=True)
class Autopsied(WorkerEvent):
    """What the worker found to have grown: a sentence each, the largest first."""

    step: int
    findings: tuple[str, ...]
    seconds: float
    complete: bool = True


@dataclass(frozen=True, slots=True)
class SampleMissing(WorkerEvent):
    """A sample that could not be had. Never read as zero."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exited(WorkerEvent):
    """The worker's leader was reaped and nothing of its group is left.

    Exactly one of `exit_code` and `signal` is set, unless the process was not ours to reap (both None).
    `stderr_tail` is the end of what it wrote, bounded by the adapter. `oom_killed`: whether the kernel counted an
    out-of-memory kill during this life; None where it can't tell.
    """

    exit_code: int | None
    signal: int | None
    stderr_tail: str = ""
    oom_killed: bool | None = None


@dataclass(frozen=True, slots=True)
class Recovered(WorkerEvent):
    """A supervisor that took over from a dead one has made sure that this generation's worker is gone.

    What the journal knows of that life: its first and last step (0 for none), the batch, the seconds that its steps
    took (`train_s`), from start to last sign of life (`lived_s`), and the highest footprint sampled.
    """

    machine_restarted: bool
    first_step: int = 0
    last_step: int = 0
    batch_size: int | None = None
    accumulation: int | None = None
    train_s: float = 0.0
    lived_s: float = 0.0
    peak_footprint_bytes: int = 0
