"""A control server with a fake backend, and Supervisord's real client in its own environment."""

import asyncio
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_supervisor.control.backend import (
    Channel,
    ConfigChanges,
    ConfigInfo,
    Fault,
    FaultCode,
    ProcessInfo,
    ProcessState,
    RunInfo,
)
from mlx_supervisor.control.transport.server import ControlServer

REPOSITORY = Path(__file__).parents[2]
STOCK = REPOSITORY / ".venv-stock"
REQUIREMENTS = REPOSITORY / "tests" / "stock-supervisor.txt"
DEADLINE_S = 20.0
SUPERVISORCTL = [sys.executable, "-m", "mlx_supervisor.cli.ctl.main"]


@dataclass
class FakeBackend:
    """Runs that are only names and states; every call is recorded in `calls`."""

    folder: Path
    runs: dict[str, ProcessInfo] = field(default_factory=dict)
    infos: dict[str, RunInfo] = field(default_factory=dict)
    available: list[str] = field(default_factory=list)
    changes: ConfigChanges = field(default_factory=ConfigChanges)
    reread_error: str = ""
    shutting_down: bool = False
    calls: list[tuple[object, ...]] = field(default_factory=list)
    start_fails: dict[str, Exception] = field(default_factory=dict)
    hold_starts: asyncio.Event | None = None

    def hold_forever(self) -> None:
        """From now on, starts last until `hold_starts` is set."""
        self.hold_starts = asyncio.Event()

    def wait_for(self, call: tuple[object, ...]) -> None:
        """Wait until this call has arrived."""
        deadline_s = time.monotonic() + DEADLINE_S
        while call not in self.calls:
            assert time.monotonic() < deadline_s, f"{call} did not arrive, only {self.calls}"
            time.sleep(0.01)

    def put(self, name: str, state: ProcessState = ProcessState.STOPPED, **fields: object) -> None:
        self.runs[name] = ProcessInfo(name, state, **fields)  # type: ignore[arg-type]

    def processes(self) -> Sequence[ProcessInfo]:
        return list(self.runs.values())

    def configs(self) -> Sequence[ConfigInfo]:
        names = {*self.runs, *self.available}
        return [ConfigInfo(name, name in self.runs, command=f"train {name}") for name in names]

    def run_info(self, name: str) -> RunInfo:
        return self.infos.get(name, RunInfo())

    async def start(self, name: str, wait: bool = True) -> None:
        self.calls.append(("start", name))
        if name in self.start_fails:
            self.runs[name] = replace(self.runs[name], state=ProcessState.FATAL, detail="cannot start")
            raise self.start_fails[name]
        self.runs[name] = replace(self.runs[name], state=ProcessState.STARTING)
        if self.hold_starts is not None and wait:
            await self.hold_starts.wait()
        self.runs[name] = ProcessInfo(name, ProcessState.RUNNING, pid=4321, started_at_s=time.time())
        self.calls.append(("started", name))

    async def stop(self, name: str, wait: bool = True) -> None:
        self.calls.append(("stop", name))
        self.runs[name] = replace(self.runs[name], state=ProcessState.STOPPED, pid=0, stopped_at_s=time.time())

    async def restart(self, name: str) -> None:
        self.calls.append(("restart", name))
        await self.start(name)

    def signal(self, name: str, signum: int) -> None:
        self.calls.append(("signal", name, signum))

    def log_path(self, name: str, channel: Channel) -> Path | None:
        return self.folder / f"{name}-{channel}.log"

    def main_log_path(self) -> Path | None:
        return self.folder / "supervisor.log"

    def clear_logs(self, name: str) -> None:
        self.calls.append(("clear_logs", name))

    def clear_main_log(self) -> None:
        self.calls.append(("clear_main_log",))

    def shutdown(self, restart: bool = False) -> None:
        self.calls.append(("shutdown", restart))
        self.shutting_down = True

    def reload_config(self) -> ConfigChanges:
        self.calls.append(("reload_config",))
        if self.reread_error:
            raise Fault(FaultCode.CANT_REREAD, self.reread_error)
        return self.changes

    async def add(self, name: str) -> None:
        self.calls.append(("add", name))
        if name in self.runs:
            raise Fault(FaultCode.ALREADY_ADDED, name)
        self.put(name)

    async def remove(self, name: str) -> None:
        self.calls.append(("remove", name))
        if self.runs[name].state is ProcessState.RUNNING:
            raise Fault(FaultCode.STILL_RUNNING, name)
        del self.runs[name]


class Served:
    """A control server on its own thread and event loop. `on_loop` runs a coroutine there and waits for it."""

    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.path = backend.folder / "supervisor.sock"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
        self.unhandled: list[dict[str, object]] = []
        self.thread.start()
        self.server = ControlServer(self.path, backend)
        self.on_loop(self.server.start())

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE_S)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, "the condition did not come true"
            time.sleep(0.01)

    def close(self) -> None:
        try:
            self.on_loop(self.server.close())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(DEADLINE_S)
            self.loop.close()
        assert not self.unhandled, "the event loop reported unhandled exceptions"


@dataclass(frozen=True)
class Ran:
    """A client's exit status and output."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: pytest's own folders are too deep for a socket."""
    with tempfile.TemporaryDirectory(prefix="ctl") as name:
        yield Path(name)


@pytest.fixture
def backend(folder: Path) -> FakeBackend:
    fake = FakeBackend(folder)
    fake.put("idle")
    fake.put("night", ProcessState.RUNNING, pid=123, started_at_s=time.time() - 62)
    return fake


@pytest.fixture
def served(backend: FakeBackend) -> Iterator[Served]:
    server = Served(backend)
    yield server
    server.close()


@contextmanager
def background(command: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A client in the background, killed at the deadline so that reading from it always ends."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as client:
        watchdog = threading.Timer(DEADLINE_S, client.kill)
        watchdog.start()
        try:
            yield client
        finally:
            watchdog.cancel()
            client.kill()


def run_client(command: list[str], **variables: str) -> Ran:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **variables}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=DEADLINE_S, env=environment, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def stock_client() -> list[str]:
    """The command of Supervisord's client; installed once, from a file with hashes."""
    python, stamp = STOCK / "bin" / "python", STOCK / "installed.txt"
    required = f"{sys.version}\n{REQUIREMENTS.read_text()}"
    with STOCK.with_name(f"{STOCK.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be installing it
        if not (stamp.exists() and stamp.read_text() == required):
            venv.create(STOCK, clear=True, with_pip=True)
            install = ["-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "-r", str(REQUIREMENTS)]
            subprocess.run([str(python), *install], check=True, timeout=300)
            stamp.write_text(required)
    return [str(python), "-m", "supervisor.supervisorctl"]


@pytest.fixture
def stock_command(served: Served, stock_client: list[str]) -> list[str]:
    """The command of Supervisord's client for the server under test."""
    # without -c, it would read a configuration in the working folder or in /etc
    configuration = served.path.with_name("stock.conf")
    configuration.write_text(f"[supervisorctl]\nserverurl={served.url}\n")
    return [*stock_client, "-c", str(configuration)]


@pytest.fixture
def stock(stock_command: list[str]) -> Callable[..., Ran]:
    """Run Supervisord's client with the server under test."""
    return lambda *words: run_client([*stock_command, *words])


@pytest.fixture
def ctl_command(served: Served) -> list[str]:
    """The command of the supervisor's client for the server under test."""
    return [*SUPERVISORCTL, "-s", served.url]


@pytest.fixture
def in_background() -> Callable[..., Any]:
    """Start a client without waiting for it."""
    return background


@pytest.fixture
def client() -> Callable[..., Ran]:
    """Run the supervisor's client without a server."""
    return lambda *words, **variables: run_client([*SUPERVISORCTL, *words], **variables)


@pytest.fixture
def ctl(ctl_command: list[str]) -> Callable[..., Ran]:
    """Run the supervisor's client with the server under test."""
    return lambda *words: run_client([*ctl_command, *words])
