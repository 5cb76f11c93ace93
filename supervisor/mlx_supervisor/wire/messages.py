"""Every message between supervisor and worker: one frame each, one ZeroMQ message each.

A message carries the version, the run, the generation (which start of the run's worker) and a sequence number that
grows by one per frame, so that lost frames can be counted.
"""

from typing import Annotated, Literal

import msgspec

from mlx_supervisor.wire.fields import Count, Digest, Metrics, PhaseName, Positive, RunName, Seconds, ShortText, Text


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Fields of every message."""

    v: Literal[1] = 1
    run: RunName
    generation: Count
    seq: Count


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """A worker's first message, which identifies it. Frames of a peer without a valid hello are dropped."""

    pid: Positive
    token: Annotated[str, msgspec.Meta(max_length=128)]


class Device(Message, frozen=True, kw_only=True, tag="device"):
    """The worker computes on a device with its own memory (CUDA). Sent once, before model and data are loaded.

    `uuid`: as the driver names the device, "" if unknown. `limit_bytes`: what this run may hold of `total_bytes`.
    """

    total_bytes: Count
    limit_bytes: Count
    uuid: ShortText = ""


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """Model, data and checkpoint are loaded. `skipped`: skipped checkpoints, each with the reason.

    `gradient_checkpointing`: whether activations are recomputed instead of kept; `can_checkpoint_gradients`: whether
    this task supports that. `requested_size`, `requested_effective`: the batch that settings or task request, which the
    one in use may not have reached; None: unknown.
    """

    step: Count
    target_steps: Count
    batch_size: Positive
    effective_batch: Positive
    checkpoint: ShortText | None = None
    skipped: Annotated[list[ShortText], msgspec.Meta(max_length=16)] = []
    notes: Annotated[list[ShortText], msgspec.Meta(max_length=16)] = []
    gradient_checkpointing: bool = False
    can_checkpoint_gradients: bool = False
    requested_size: Positive | None = None
    requested_effective: Positive | None = None


class Step(Message, frozen=True, kw_only=True, tag="step"):
    """One optimizer update; memory in bytes by MLX's counters. `dropped`: frames that this worker could not send.

    `resident_bytes`, `process_bytes`: resident set and footprint of the worker alone, as it reads them at the end of
    the update.

    `loss`: None if the update has no token to learn. `metrics`: the task's own, and `grad_norm` if the gradients are
    clipped. `device_limit_bytes`: the limit on a device with its own memory, which the counters are of; 0: they are of
    the machine's memory. `device_free_bytes`: what all processes leave of it, read at most once a second.
    """

    step: Count
    loss: float | None
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
    process_bytes: Count = 0
    phase: PhaseName = "train"
    dropped: Count = 0
    metrics: Metrics = {}
    device_limit_bytes: Count = 0
    device_free_bytes: Count | None = None


class Checkpoint(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """A checkpoint became durable, or failed and training continues. `stall_s`: how long it stalled training.

    `notes`: what else happened to the checkpoint folder.
    """

    step: Count
    ok: bool
    seconds: Seconds
    stall_s: Seconds
    size_bytes: Count
    error: Text = ""
    notes: Annotated[list[ShortText], msgspec.Meta(max_length=16)] = []


class PhaseChange(Message, frozen=True, kw_only=True, tag="phase"):
    """The worker's phase; sent at every change, and as a heartbeat within long phases.

    `waiting_for`: what the worker lacks to save or export its finished work, for example room on the disk.
    """

    phase: PhaseName
    detail: ShortText = ""
    waiting_for: ShortText = ""


class Validation(Message, frozen=True, kw_only=True, tag="validation"):
    """The validation loss after an update, and the evaluation's other figures."""

    step: Count
    loss: float
    metrics: Metrics = {}


class Tested(Message, frozen=True, kw_only=True, tag="tested"):
    """The result of the test at completion, as a sentence. `loss`: where the test gives a number."""

    text: Text
    loss: float | None = None


class Cleared(Message, frozen=True, kw_only=True, tag="cleared"):
    """Answer to `clear_cache`, with the counters after it."""

    active_bytes: Count
    cache_bytes: Count


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of object that grew in number: at the baseline `count_before`, now `count_now`.

    `what`: a shape and type ("float32 [8, 512, 258]"), a Python type, or a compiled function. `size_bytes`: of all of
    them now, 0 where unknown. `holder`: what refers to them, with file and line where known.
    """

    kind: Literal["arrays", "objects", "compiled", "note"]
    what: ShortText
    count_before: Count = 0
    count_now: Count = 0
    size_bytes: Count = 0
    holder: ShortText = ""


class AutopsyReport(Message, frozen=True, kw_only=True, tag="autopsy"):
    """Answer to `autopsy`: what grew since the baseline, the largest first. `seconds`: the duration of the search."""

    step: Count
    seconds: Seconds
    complete: bool = True
    findings: Annotated[list[Finding], msgspec.Meta(max_length=24)] = []


class Raised(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An exception: its dotted type, its message, and the innermost frame of the user's code, else of any code."""

    kind: ShortText
    message: Text = ""
    file: Text = ""
    line: Count = 0
    function: ShortText = ""


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """Last message of a worker. `errors`: the exception that ended it, then those that led to it.

    `lost`: what a stopped worker could not save or export. `exported`: the folder of a completed run's result, if any.
    `device_held_bytes`, `device_free_bytes`: of a device with its own memory, after an error: what MLX held of it, and
    what all processes left. `target_steps`: as in `ready`, 0 before it.
    """

    outcome: Literal["completed", "stopped", "failed", "refused"]
    reason: Text
    step: Count
    loss: float | None = None
    weights_sha256: Digest | None = None
    errors: Annotated[list[Raised], msgspec.Meta(max_length=8)] = []
    lost: ShortText = ""
    exported: Text = ""
    device_held_bytes: Count | None = None
    device_free_bytes: Count | None = None
    target_steps: Count = 0


WorkerMessage = (
    Hello | Device | Ready | Step | Checkpoint | PhaseChange | Validation | Tested | Cleared | AutopsyReport | Bye
)


class ClearCache(Message, frozen=True, kw_only=True, tag="clear_cache"):
    """Clear MLX's cache, run Python's garbage collector, and answer `cleared`."""


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Finish the update, write a checkpoint, say bye, and exit with `EXIT_STOPPED`.

    `waits`: on a full or failing disk, wait until the checkpoint is saved; a later request without it ends the wait.
    """

    reason: ShortText = ""
    waits: bool = False


class Resize(Message, frozen=True, kw_only=True, tag="resize"):
    """From the next update, use micro-batch `batch_size` and effective batch `effective_batch`."""

    batch_size: Positive
    effective_batch: Positive


class Autopsy(Message, frozen=True, kw_only=True, tag="autopsy"):
    """Search for what grew, for at most `limit_s` seconds, and answer with an `AutopsyReport`."""

    limit_s: Seconds = 5.0


SupervisorMessage = ClearCache | Stop | Resize | Autopsy
