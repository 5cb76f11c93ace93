"""The protocol between supervisor and worker: messages, the job file, exit statuses, environment variables."""

from mlx_supervisor.wire.fields import METRIC_NAME_LIMIT, METRICS_LIMIT, VERSION, PhaseName, WireError
from mlx_supervisor.wire.frames import FRAME_LIMIT_BYTES, decode_supervisor, decode_worker, encode
from mlx_supervisor.wire.job import (
    JOB_LIMIT_BYTES,
    BatchJob,
    CheckpointJob,
    DrillJob,
    Job,
    MemoryJob,
    TaskJob,
    dump_json,
    load_job,
)
from mlx_supervisor.wire.messages import (
    Autopsy,
    AutopsyReport,
    Bye,
    Checkpoint,
    ClearCache,
    Cleared,
    Device,
    Finding,
    Hello,
    Message,
    PhaseChange,
    Raised,
    Ready,
    Resize,
    Step,
    Stop,
    SupervisorMessage,
    Tested,
    Validation,
    WorkerMessage,
)
from mlx_supervisor.wire.process import (
    DISK_ERRORS,
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_HANG,
    EXIT_NOT_FINITE,
    EXIT_REFUSED,
    EXIT_STOPPED,
    HANG_LINE,
    LIFELINE_VARIABLE,
    LOCK_VARIABLE,
    RESERVE_BYTES,
    STDERR_TAIL_LIMIT_BYTES,
    TOKEN_VARIABLE,
)
