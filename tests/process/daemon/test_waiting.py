"""Starts that wait for memory, on a machine whose memory the test controls."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.process import harness

from mlx_supervisor.control.backend import Fault
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.daemon import control_adapter
from mlx_supervisor.daemon.control_adapter import DaemonBackend
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.run import SupervisedRun
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.host import memory
from mlx_supervisor.host.memory import MachineMemory
from mlx_supervisor.process import launch
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import StateDir

GIB = 2**30


class FakeMemory:
    """The machine's memory as the daemon reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.available_bytes = 8 * GIB
        self.broken = False
        monkeypatch.setattr(memory, "read", self.read)

    def read(self) -> MachineMemory:
        if self.broken:
            raise OSError("no such file")
        return MachineMemory(self.available_bytes, ev.MemoryPressure.NORMAL)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    monkeypatch.setenv(launch.WORKER_VARIABLE, f"{sys.executable} {harness.MISBEHAVE}")
    return FakeMemory(monkeypatch)


@asynccontextmanager
async def running(folder: Path, observer: Observer) -> AsyncIterator[SupervisedRun]:
    """A running run with a checkpoint."""
    read = read_settings(harness.write_settings(folder, args={"delay_s": 0.01}, steps=10**6))
    state = StateDir(read.state_dir)
    daemon = Daemon(read, state, [observer])
    async with asyncio.timeout(harness.PATIENCE_S):
        await daemon.open()
        try:
            run = daemon.runs["run"]
            run.command(ev.CommandKind.START)
            await run.until(lambda: run.machine.history.durable_step > 0 and run.machine.last_sample is not None)
            yield run
            daemon.kill_all("the test is over")
            await daemon.suspend()
        finally:
            await daemon.close()
            state.close()


def test_a_start_waits_until_memory_is_available(tmp_path: Path, machine: FakeMemory) -> None:
    observer = harness.NoticeList()

    async def scenario() -> None:
        async with running(tmp_path, observer) as run:
            machine.available_bytes = 0
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.state is State.WAITING)
            assert "waiting for memory" in run.machine.reason
            assert run.pid is None
            machine.available_bytes = 8 * GIB
            await run.until(lambda: run.machine.state is State.RUNNING)
            assert run.machine.history.generation == 2

    asyncio.run(scenario())
    assert [kind for kind in observer.kinds if kind.startswith("wait")] == ["waiting", "waited"]


def test_available_memory_is_not_waited_for(tmp_path: Path, machine: FakeMemory) -> None:
    observer = harness.NoticeList()

    async def scenario() -> None:
        async with running(tmp_path, observer) as run:
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.history.generation == 2)

    asyncio.run(scenario())
    assert "waiting" not in observer.kinds


def test_memory_that_becomes_available_during_a_backoff_is_not_waited_for(tmp_path: Path, machine: FakeMemory) -> None:
    observer = harness.NoticeList()

    async def scenario() -> None:
        async with running(tmp_path, observer) as run:
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.history.generation == 2)
            machine.available_bytes = 0
            run.signal(signal.SIGKILL)  # before a new checkpoint
            await run.until(lambda: run.machine.state is State.BACKOFF)
            machine.available_bytes = 8 * GIB
            await run.until(lambda: run.machine.history.generation == 3)

    asyncio.run(scenario())
    assert "waiting" not in observer.kinds


def test_a_waiting_run_can_be_stopped(tmp_path: Path, machine: FakeMemory) -> None:
    async def scenario() -> None:
        async with running(tmp_path, harness.NoticeList()) as run:
            machine.available_bytes = 0
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.state is State.WAITING)
            run.command(ev.CommandKind.STOP)
            assert run.at_rest

    asyncio.run(scenario())


def test_unreadable_memory_does_not_block_a_start(tmp_path: Path, machine: FakeMemory) -> None:
    async def scenario() -> None:
        async with running(tmp_path, harness.NoticeList()) as run:
            machine.available_bytes = 0
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.state is State.WAITING)
            machine.broken = True
            run.command(ev.CommandKind.RESTART)
            await run.until(lambda: run.machine.state is State.RUNNING)
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.machine.history.generation == 3)

    asyncio.run(scenario())


def test_a_start_command_reports_a_long_wait_for_memory(
    tmp_path: Path, machine: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_adapter, "PAUSE_S", 0.2)

    async def scenario() -> None:
        async with running(tmp_path, harness.NoticeList()) as run:
            daemon = SimpleNamespace(runs={"run": run}, shutdown_requested=asyncio.Event())
            backend = DaemonBackend(cast(Daemon, daemon))
            await backend.stop("run")
            machine.available_bytes = 0
            with pytest.raises(Fault, match="waiting for memory"):
                await backend.start("run")
            assert run.machine.state is State.WAITING
            machine.available_bytes = 8 * GIB
            await run.until(lambda: run.machine.state is State.RUNNING)
            await backend.stop("run")
            machine.available_bytes = 0
            monkeypatch.setattr(control_adapter, "PAUSE_S", harness.PATIENCE_S)
            asyncio.get_running_loop().call_later(0.05, lambda: setattr(machine, "available_bytes", 8 * GIB))
            await backend.start("run")  # a short wait is not reported
            assert run.machine.state is State.RUNNING

    asyncio.run(scenario())
