"""What the control plane drives: the protocol that the daemon implements, and the types that cross it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, Protocol, TypedDict

Channel = Literal["stdout", "stderr"]


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


class Fault(Exception):  # noqa: N818 - the protocol's own word
    """A refusal that the client is told about: a number for programs and a text for people."""

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
"""Those in which `start` says "already started", and the only ones in which `stop` has something to stop."""
SIGNALLABLE_STATES = frozenset({ProcessState.STARTING, ProcessState.RUNNING, ProcessState.STOPPING})


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One run, as Supervisord would see it. Its group has its name.

    `started_at_s`, `stopped_at_s`: seconds since 1970, 0 for never. `pid`: 0 when there is none.
    `exit_status`: the last exit code, -1 after a signal, None when nothing has ended yet.
    `detail`: why it is FATAL or in BACKOFF, or what it is busy with when STARTING or STOPPING; else "".
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
    """One run of the settings as last read. `in_use`: false until `add` has taken it in."""

    name: str
    in_use: bool
    autostart: bool = False
    command: str = ""
    directory: str = ""
    stop_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """What a reread of the settings found, against the runs in use: names of runs."""

    added: Sequence[str] = ()
    changed: Sequence[str] = ()
    removed: Sequence[str] = ()


class RunInfo(TypedDict, total=False):
    """What Supervisord's own process info cannot say. A key that is not known is left out (or None).

    `leak`: the detector's verdict in words, "" when there is none. `breaker`: closed, open or half-open. `error`: what
    ended the last life that nobody asked to end. `autopsy`: what grew, as the worker that was last asked found.
    """

    generation: int | None
    phase: str | None
    step: int | None
    target_steps: int | None
    loss: float | None
    batch_size: int | None
    accumulation: int | None
    effective_batch: int | None
    footprint_bytes: int | None
    limit_bytes: int | None
    active_bytes: int | None
    cache_bytes: int | None
    leak: str | None
    leak_bytes_per_step: float | None
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
    autopsy: list[str] | None


class Backend(Protocol):
    """The daemon, as the control plane needs it. All of it is called on the event loop.

    Every method that takes a name raises Fault BAD_NAME for one that is not in use. An `async` method may be under way
    several times at once; one that has begun is never cancelled because its client went away, only by
    `ControlServer.close`. What is not `async` answers at once. Other exceptions than Fault are bugs: they are logged
    and reach the client as FAILED.
    """

    @property
    def shutting_down(self) -> bool:
        """True from `shutdown` on: only what reads is still answered."""
        ...

    def processes(self) -> Sequence[ProcessInfo]:
        """All runs in use."""
        ...

    def configs(self) -> Sequence[ConfigInfo]:
        """All runs of the settings as last read, in use or not."""
        ...

    def run_info(self, name: str) -> RunInfo:
        """What Supervisord's process info cannot say about one run."""
        ...

    async def start(self, name: str) -> None:
        """Return when the run is ready.

        Faults: ALREADY_STARTED, SPAWN_ERROR, ABNORMAL_TERMINATION (it ended, or was stopped, before it was ready).
        """
        ...

    async def stop(self, name: str) -> None:
        """Return when nothing of the run is left. Faults: NOT_RUNNING, FAILED."""
        ...

    async def restart(self, name: str) -> None:
        """Stop it if it runs, then start it. Faults: those of `start`."""
        ...

    def signal(self, name: str, signum: int) -> None:
        """Send a signal to the run's process. Faults: NOT_RUNNING, FAILED."""
        ...

    def log_path(self, name: str, channel: Channel) -> Path | None:
        """The file that a run's output is in; None when there is none."""
        ...

    def main_log_path(self) -> Path | None:
        """The daemon's own log; None when it writes none."""
        ...

    def clear_logs(self, name: str) -> None:
        """Empty both logs of a run. Faults: FAILED."""
        ...

    def clear_main_log(self) -> None:
        """Empty the daemon's log. Faults: FAILED, NO_FILE."""
        ...

    def shutdown(self, restart: bool = False) -> None:
        """Begin to stop every run and then the daemon, and return at once. `restart`: start it again afterwards.

        Faults: FAILED when nothing could start it again.
        """
        ...

    def reload_config(self) -> ConfigChanges:
        """Read the settings again and change nothing yet. Faults: CANT_REREAD with the settings' error."""
        ...

    async def add(self, name: str) -> None:
        """Take a run of the reread settings into use, and begin to start it if it says `autostart`.

        Faults: BAD_NAME when the settings have none of that name, ALREADY_ADDED.
        """
        ...

    async def remove(self, name: str) -> None:
        """Take a run out of use. Faults: STILL_RUNNING."""
        ...
