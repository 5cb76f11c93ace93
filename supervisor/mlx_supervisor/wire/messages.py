"""Every message between supervisor and worker, the worker's job, and the checkpoint's manifest.

Frames are msgpack maps (one per ZeroMQ message), at most `FRAME_LIMIT_BYTES` long. Each names its type, the version,
the run, the generation (incarnation number of the worker) and a sequence number that grows by one per frame, so that
drops can be counted. The job and the manifest are JSON files.
"""

from typing import Annotated, Any, Literal

import msgspec

from mlx_supervisor.wire.fields import (
    VERSION,
    Count,
    Digest,
    M,
    PhaseName,
    Positive,
    RunName,
    Seconds,
    ShortText,
    Text,
    WireError,
)

FRAME_LIMIT_BYTES = 64 * 1024
"""A longer frame is counted and dropped."""


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
