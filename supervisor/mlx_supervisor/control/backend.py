"""What the control interface drives: a protocol that the daemon implements, and its types."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, Protocol, TypedDict

Channel = Literal["stdout", "stderr"]
CHANNELS: tuple[Channel, ...] = ("stdout", "stderr")


class FaultCode(IntEnum):
    """Supervisord's fault numbers (its `xmlrpc.Faults`, API version 3.0)."""

    UNKNOWN_METHOD = 1
    INCORRECT_PARAMETERS = 2
    BAD_ARGUMENTS = 3
    SIGNATURE_UNSUPPORTED = 4
    SHUTDOWN_STATE = 6
    BAD_NAME = 10
    BAD_SIGNAL = 11
    NO_FILE = 20
    NOT_EXECUTABLE = 21
    FAILED = 30
    ABNORMAL_TERMINATION = 40
    SPAWN_ERROR = 50
    ALREADY_STARTED = 60
    NOT_RUNNING = 70
    SUCCESS = 80
    ALREADY_ADDED = 90
    STILL_RUNNING = 91
    CANT_REREAD = 92


class Fault(Exception):  # noqa: N818 - the name in XML-RPC
    """The error that a call returns to its client: a number for programs and a text for people."""

    def __init__(self, code: FaultCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code
        self.text = text


class ProcessState(IntEnum):
    """Supervisord's process states, with its numbers."""

    STOPPED = 0
    STARTING = 10
    RUNNING = 20
    BACKOFF = 30
    STOPPING = 40
    EXITED = 100
    FATAL = 200
    UNKNOWN = 1000


STARTED_STATES = frozenset({ProcessState.STARTING, ProcessState.RUNNING, ProcessState.BACKOFF})
"""`start` refuses these with ALREADY_STARTED; `stop` refuses all others with NOT_RUNNING."""
SIGNALLABLE_STATES = frozenset({ProcessState.STARTING, ProcessState.RUNNING, ProcessState.STOPPING})


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One run as a process of Supervisord. Its group has the same name.

    `started_at_s`, `stopped_at_s`: seconds since 1970, 0 for never. `pid`: 0 when there is none.
    `exit_status`: the last exit code, -1 after a signal, None before the first exit.
    `detail`: why it is FATAL or in BACKOFF, what it does while STARTING or STOPPING, or why its last start was refused
    while STOPPED or EXITED; else "".
    """

    name: str
    state: ProcessState
    pid: int = 0
    started_at_s: float = 0.0
    stopped_at_s: float = 0.0
    exit_status: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ConfigInfo:
    """One run of the settings as last read. `in_use`: false until it is added."""

    name: str
    in_use: bool
    autostart: bool = False
    command: str = ""
    directory: str = ""
    stop_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """How the settings as last read differ from the runs in use: names of runs."""

    added: Sequence[str] = ()
    changed: Sequence[str] = ()
    removed: Sequence[str] = ()


class RunInfo(TypedDict, total=False):
    """Progress and memory of a run. Unknown values are left out or None; docs/control.md describes the keys.

    `leak`: "leaking", or "" without a leak. `breaker`: closed, open or half-open. `error`: what ended the last
    generation that failed. `waiting_for`: what keeps a worker that has made all steps from saving or exporting.
    `autopsy`: the objects that grew, as the worker found them. `*_to_limit`: until memory at its present growth
    reaches the limit. `device_*`: of a device with its own memory; left out without one.
    """

    generation: int | None
    phase: str | None
    step: int | None
    target_steps: int | None
    loss: float | None
    validation_loss: float | None
    validation_step: int | None
    best_validation_loss: float | None
    best_validation_step: int | None
    smoothed_loss: float | None
    activity: str | None
    metrics: dict[str, float | None] | None
    validation_metrics: dict[str, float | None] | None
    batch_size: int | None
    accumulation: int | None
    effective_batch: int | None
    footprint_bytes: int | None
    limit_bytes: int | None
    device_used_bytes: int | None
    device_limit_bytes: int | None
    device_total_bytes: int | None
    device_others_bytes: int | None
    active_bytes: int | None
    cache_bytes: int | None
    leak: str | None
    leak_bytes_per_step: float | None
    leak_by_cause_bytes_per_step: dict[str, float] | None
    steps_to_limit: float | None
    seconds_to_limit: float | None
    breaker: str | None
    trips: int | None
    restarts: int | None
    checkpoint_step: int | None
    tokens_per_s: float | None
    eta_s: float | None
    outcome: str | None
    reason: str | None
    gradient_checkpointing: bool | None
    error: str | None
    waiting_for: str | None
    autopsy: list[str] | None


class Backend(Protocol):
    """The daemon, as the control interface uses it. Every method is called on the event loop.

    A method that takes the name of a run raises Fault BAD_NAME if no such run is in use. Several calls of an `async`
    method may run at once; `ControlServer.close` cancels them, a client that disconnects does not. The other methods
    return at once. An exception that is not a Fault is a bug: it is logged and reaches the client as FAILED.
    """

    @property
    def shutting_down(self) -> bool:
        """True after `shutdown`: only methods that change nothing are still answered."""

    def processes(self) -> Sequence[ProcessInfo]:
        """All runs in use."""

    def configs(self) -> Sequence[ConfigInfo]:
        """All runs of the settings as last read, in use or not."""

    def run_info(self, name: str) -> RunInfo:
        """Progress and memory of one run."""

    async def start(self, name: str, wait: bool = True) -> None:
        """Start a run and return when it is ready; without `wait`, as soon as the next supervisor would start it.

        Faults: ALREADY_STARTED, SPAWN_ERROR, ABNORMAL_TERMINATION (it ended or was stopped before it was ready),
        FAILED (the start can't be recorded).
        """

    async def stop(self, name: str, wait: bool = True) -> None:
        """Stop a run and return when all its processes have ended.

        Without `wait`, return as soon as the next supervisor would not resume it. Faults: NOT_RUNNING, FAILED (the
        stop can't be recorded).
        """

    async def restart(self, name: str) -> None:
        """Stop a run if it is started, then start it. Faults: those of `start`."""

    def signal(self, name: str, signum: int) -> None:
        """Send a signal to the run's worker. Faults: NOT_RUNNING, FAILED."""

    def log_path(self, name: str, channel: Channel) -> Path | None:
        """The file with a run's output; None if it has none."""

    def main_log_path(self) -> Path | None:
        """The daemon's log; None if it writes none."""

    def clear_logs(self, name: str) -> None:
        """Empty both logs of a run. Faults: FAILED."""

    def clear_main_log(self) -> None:
        """Empty the daemon's log. Faults: FAILED, NO_FILE."""

    def shutdown(self, restart: bool = False) -> None:
        """Begin to stop all runs, then the daemon, and return at once. `restart`: start the daemon again afterwards."""

    def reload_config(self) -> ConfigChanges:
        """Read the settings again without applying them. Faults: CANT_REREAD with the error in the settings."""

    async def add(self, name: str) -> None:
        """Add a run of the settings as last read, and begin to start it if it has `autostart`.

        Faults: BAD_NAME if the settings have no such run, ALREADY_ADDED, FAILED.
        """

    async def remove(self, name: str) -> None:
        """Remove a stopped run. Faults: STILL_RUNNING."""
