"""Every message between supervisor and worker, the worker's job, and the checkpoint's manifest.

Frames are msgpack maps (one per ZeroMQ message), at most `FRAME_LIMIT_BYTES` long. Each names its type, the version,
the run, the generation (incarnation number of the worker) and a sequence number that grows by one per frame, so that
drops can be counted. The job and the manifest are JSON files.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec

VERSION = 1
FRAME_LIMIT_BYTES = 64 * 1024
"""A longer frame is counted and dropped."""
JOB_LIMIT_BYTES = 1024 * 1024
MANIFEST_LIMIT_BYTES = 256 * 1024
STDERR_TAIL_LIMIT_BYTES = 16 * 1024

EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75
"""Stopped on request, checkpointed first (sysexits' EX_TEMPFAIL: try again later)."""
EXIT_NOT_FINITE = 65
"""The loss is no longer a finite number (sysexits' EX_DATAERR); nothing was saved of it."""
EXIT_REFUSED = 78
"""The job cannot be done as it stands; starting again changes nothing (sysexits' EX_CONFIG)."""

TOKEN_VARIABLE = "MLX_SUPERVISOR_TOKEN"  # noqa: S105 - the variable's name
"""Environment variable with the secret that the worker's hello must show; it also marks the worker's descendants."""
LIFELINE_VARIABLE = "MLX_SUPERVISOR_LIFELINE"
"""Environment variable with the number of a pipe's read end; end of file there means that the supervisor is gone."""

RunName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
PhaseName = Literal["load", "train", "eval", "checkpoint"]


class WireError(ValueError):
    """A frame or a file that is not what it should be. `kind`: oversized, malformed, version or type."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What every frame carries."""

    v: Literal[1] = 1
    run: RunName
    generation: Count
    seq: Count


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First word of a worker: who it is. Frames of a peer that has not said a valid hello are dropped."""

    pid: Positive
    token: Annotated[str, msgspec.Meta(max_length=128)]
    versions: ShortText = ""


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """Model, data and checkpoint are loaded. `passed_over`: checkpoints not used, each with the reason.

    `gradient_checkpointing`: whether activations are computed again instead of kept; `can_checkpoint_gradients`:
    whether this task could.
    """

    step: Count
    target_steps: Count
    batch_size: Positive
    effective_batch: Positive
    checkpoint: ShortText | None = None
    passed_over: Annotated[list[ShortText], msgspec.Meta(max_length=16)] = []
    notes: Annotated[list[ShortText], msgspec.Meta(max_length=16)] = []
    gradient_checkpointing: bool = False
    can_checkpoint_gradients: bool = False


class Step(Message, frozen=True, kw_only=True, tag="step"):
    """One optimizer update; memory in bytes by MLX's own counters. `dropped`: frames this worker could not send."""

    step: Count
    loss: float
    tokens: Count
    samples: Count
    learning_rate: float
    seconds: Seconds
    batch_size: Positive
    accumulation: Positive
    active_bytes: Count
    cache_bytes: Count
    peak_bytes: Count
    resident_bytes: Count
    phase: PhaseName = "train"
    dropped: Count = 0


class Checkpoint(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """A checkpoint became durable, or failed and the run goes on. `stall_s`: how long training stood still for it."""

    step: Count
    ok: bool
    seconds: Seconds
    stall_s: Seconds
    size_bytes: Count
    error: Text = ""


class PhaseChange(Message, frozen=True, kw_only=True, tag="phase"):
    """Where the worker stands; sent at every change and as a sign of progress inside long phases."""

    phase: PhaseName
    detail: ShortText = ""


class Cleared(Message, frozen=True, kw_only=True, tag="cleared"):
    """Answer to `clear_cache`, with the counters after it."""

    active_bytes: Count
    cache_bytes: Count


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that grew: its kind, what it is, how many there were at the baseline and are now.

    `what`: a shape and type ("float32 [8, 512, 258]"), a Python type, or a compiled function. `size_bytes`: of all
    that there are now, 0 where it can't be told. `holder`: what refers to them, with file and line where that is known.
    """

    kind: Literal["arrays", "objects", "compiled", "note"]
    what: ShortText
    count_before: Count = 0
    count_now: Count = 0
    size_bytes: Count = 0
    holder: ShortText = ""


class AutopsyReport(Message, frozen=True, kw_only=True, tag="autopsy"):
    """Answer to `autopsy`: what grew since the baseline, the largest first. `seconds`: what the search took."""

    step: Count
    baseline_step: Count
    seconds: Seconds
    complete: bool = True
    findings: Annotated[list[Finding], msgspec.Meta(max_length=24)] = []


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """Last word of a worker."""

    outcome: Literal["completed", "stopped", "failed", "refused"]
    reason: Text
    step: Count
    loss: float | None = None
    weights_sha256: Digest | None = None


WorkerMessage = Hello | Ready | Step | Checkpoint | PhaseChange | Cleared | AutopsyReport | Bye


class CheckpointNow(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """Write a checkpoint after the update in hand."""


class ClearCache(Message, frozen=True, kw_only=True, tag="clear_cache"):
    """Clear MLX's cache, collect garbage, and answer `cleared`."""


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Checkpoint after the update in hand, say bye, and exit with `EXIT_STOPPED`."""

    reason: ShortText = ""


class Resize(Message, frozen=True, kw_only=True, tag="resize"):
    """From the next update, hold `batch_size` samples in memory; an update has `effective_batch`."""

    batch_size: Positive
    effective_batch: Positive


class Autopsy(Message, frozen=True, kw_only=True, tag="autopsy"):
    """Look for what grew, for at most `limit_s` seconds, and answer with an `AutopsyReport`."""

    limit_s: Seconds = 5.0


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Answer with the present phase."""


SupervisorMessage = CheckpointNow | ClearCache | Stop | Resize | Autopsy | Ping

_worker_decoder: "msgspec.msgpack.Decoder[WorkerMessage]" = msgspec.msgpack.Decoder(WorkerMessage)
_supervisor_decoder: "msgspec.msgpack.Decoder[SupervisorMessage]" = msgspec.msgpack.Decoder(SupervisorMessage)
_encoder = msgspec.msgpack.Encoder()


class _Version(msgspec.Struct):
    v: Any = None


_version_decoder = msgspec.msgpack.Decoder(_Version)

M = TypeVar("M")


def encode(message: Message) -> bytes:
    """The message as a msgpack map. Raises WireError when the frame would be over the limit."""
    frame = _encoder.encode(message)
    if len(frame) > FRAME_LIMIT_BYTES:
        raise WireError("oversized", f"{len(frame)} bytes, the limit is {FRAME_LIMIT_BYTES}")
    return frame


def decode_worker(frame: bytes) -> WorkerMessage:
    """What a worker sent. Raises WireError."""
    return _decode(_worker_decoder, frame)


def decode_supervisor(frame: bytes) -> SupervisorMessage:
    """What the supervisor sent. Raises WireError."""
    return _decode(_supervisor_decoder, frame)


def _decode(decoder: "msgspec.msgpack.Decoder[M]", frame: bytes) -> M:
    if len(frame) > FRAME_LIMIT_BYTES:
        raise WireError("oversized", f"{len(frame)} bytes, the limit is {FRAME_LIMIT_BYTES}")
    try:
        message = decoder.decode(frame)
    except msgspec.ValidationError as error:
        version = _version_of(frame)
        if version != VERSION:
            raise WireError("version", f"found {version!r:.40}, this side speaks {VERSION}") from None
        raise WireError("type", str(error)) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise WireError("malformed", str(error)) from None
    if _version_of(frame) != VERSION:  # the default of `v` is for senders; a frame has to say it
        raise WireError("version", f"no version, this side speaks {VERSION}")
    return message


def _version_of(frame: bytes) -> object:
    try:
        return _version_decoder.decode(frame).v
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError):
        return None


class BatchJob(msgspec.Struct, frozen=True, kw_only=True):
    """`size`: samples in memory at once; `effective`: samples of one update. None: the task's configuration decides.

    `sample_log`: append the ids of every update's samples to `samples.jsonl` in the run's folder.
    """

    size: Positive | None = None
    effective: Positive | None = None
    preserve_effective: bool = True
    sample_log: bool = False


class MemoryJob(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of MLX's cache; `release_pause_s` is waited after each clearing.

    `policy` "adaptive": it may hold what the limits leave over the measured need. "always": it is cleared at the points
    named by `clear_…`, which otherwise mean nothing. "never": MLX's own limits, and nothing else.
    `limit_bytes`: what the supervisor allows the worker's process group; None: nobody watches.
    `device_limit_bytes`, or else `device_limit_share` of what it has: for a device with memory of its own.
    `gradient_checkpointing`: compute activations again in the backward pass instead of keeping them.
    """

    policy: Literal["adaptive", "always", "never"] = "adaptive"
    clear_before_gradients: bool = False
    clear_after_gradients: bool = False
    clear_after_update: bool = True
    release_pause_s: Seconds = 0.0
    cache_limit_bytes: Count | None = None
    limit_bytes: Count | None = None
    device_limit_bytes: Count | None = None
    device_limit_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    gradient_checkpointing: bool = False


class CheckpointJob(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint is taken when any interval has passed (0 switches one off); the `keep` newest stay.

    `overhead`: an interval that the worker derives from what a checkpoint costs and from
    `mean_time_between_failures_s`, so that training stands still for at most that share of the time.
    `tighter_steps`: besides, for the first `TIGHTER_TIMES` times as many updates of this life, because one before it
    ended without having saved anything. `keep_best`: besides, the one with the lowest validation loss stays.
    """

    every_steps: Count = 0
    tighter_steps: Count = 0
    every_seconds: Seconds = 60.0
    overhead: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    mean_time_between_failures_s: Seconds = 14_400.0
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    keep_best: bool = False


class DrillJob(msgspec.Struct, frozen=True, kw_only=True):
    """Fire drills: deliberate faults. Steps are optimizer updates; `generations` empty means every life.

    `leak_mib_per_step`: memory never released again, as MLX arrays or as native memory.
    `allocate_mib` at `allocate_at_step`: one sudden allocation, kept.
    `hang_kind`: "python" sleeps, "native" holds the interpreter's lock in native code.
    """

    generations: list[Positive] = []
    leak_mib_per_step: Seconds = 0.0
    leak_kind: Literal["arrays", "native"] = "arrays"
    leak_from_step: Count = 0
    allocate_mib: Count = 0
    allocate_at_step: Count | None = None
    crash_at_step: Count | None = None
    hang_at_step: Count | None = None
    hang_kind: Literal["python", "native"] = "python"
    ignore_sigterm: bool = False
    slow_start_s: Seconds = 0.0


class TaskJob(msgspec.Struct, frozen=True, kw_only=True):
    """`mlx_lm`: `config` is the YAML file. `python`: `entry` is "package.module:function", called with `args`.

    `base_dir` is the folder of the settings file: relative paths start there, and it is put on `sys.path`.
    """

    kind: Literal["mlx_lm", "python"]
    base_dir: str
    config: str | None = None
    entry: str | None = None
    args: dict[str, Any] = {}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker is told at its start, in `job.json` of its run's folder. Paths are absolute.

    `steps` None: the task's configuration decides. `telemetry` None: nobody listens (a bare run).
    `grace_s`: how long the worker may go on after its supervisor died, before it ends itself.
    `deterministic`: on CUDA, only kernels that give the same bits in every run.
    `stop_on_not_finite`: end with `EXIT_NOT_FINITE` at the first update whose loss is NaN or infinite.
    """

    v: Literal[1] = 1
    run: RunName
    generation: Positive
    run_dir: str
    telemetry: str | None = None
    seed: Count = 0
    steps: Positive | None = None
    task: TaskJob
    batch: BatchJob = BatchJob()
    memory: MemoryJob = MemoryJob()
    checkpoint: CheckpointJob = CheckpointJob()
    drill: DrillJob = DrillJob()
    grace_s: Seconds = 30.0
    hang_timeout_s: Seconds | None = None
    stop_on_not_finite: bool = True
    deterministic: bool = False


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=128)]
    size_bytes: Count
    sha256: Digest


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`MANIFEST.json`, written last: a checkpoint folder without a manifest that verifies is not a checkpoint."""

    v: Literal[1] = 1
    run: RunName
    step: Count
    files: Annotated[list[FileEntry], msgspec.Meta(min_length=1, max_length=64)]


def load_job(data: bytes) -> Job:
    """The job in a `job.json`. Raises WireError."""
    return _load_json(data, Job, JOB_LIMIT_BYTES)


def load_manifest(data: bytes) -> Manifest:
    """The manifest in a `MANIFEST.json`. Raises WireError."""
    return _load_json(data, Manifest, MANIFEST_LIMIT_BYTES)


def dump_json(value: msgspec.Struct) -> bytes:
    """A job or a manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _load_json(data: bytes, kind: type[M], limit_bytes: int) -> M:
    if len(data) > limit_bytes:
        raise WireError("oversized", f"{len(data)} bytes, the limit is {limit_bytes}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise WireError("type", str(error)) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise WireError("malformed", str(error)) from None
