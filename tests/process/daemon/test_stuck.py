"""Failures of the supervisor itself: bugs, a stuck event loop, a failing display or journal."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from tests.process import harness

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.daemon import daemon
from mlx_supervisor.daemon import run as supervised_run
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.run import SupervisedRun
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.journal import OpenGeneration
from mlx_supervisor.process import child
from mlx_supervisor.process.launch import WORKER_VARIABLE
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import StateDir
from mlx_supervisor.wire import TOKEN_VARIABLE


@asynccontextmanager
async def opened(settings: Path, *observers: Observer) -> AsyncIterator[Daemon]:
    """A daemon in this process; its workers have ended at the end."""
    read = read_settings(settings)
    state = StateDir(read.state_dir)
    try:
        running = Daemon(read, state, observers)
        async with asyncio.timeout(harness.PATIENCE_S):
            await running.open()
            try:
                yield running
                running.kill_all("the test is over")
                await running.suspend()
            finally:
                await running.close()
    finally:
        state.close()


@pytest.fixture(autouse=True)
def misbehaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_VARIABLE, f"{sys.executable} {harness.MISBEHAVE}")


async def started(running: Daemon) -> SupervisedRun:
    run = running.runs["run"]
    run.command(ev.CommandKind.START)
    await run.until(lambda: run.machine.last_step is not None)
    return run


def test_a_bug_in_the_supervisor_kills_the_worker_and_the_run_can_be_started_again(folder, monkeypatch) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=10**6)

    async def scenario() -> None:
        async with opened(settings) as running:
            run = await started(running)
            pid = run.pid
            with monkeypatch.context() as broken:
                broken.setattr(supervised_run, "apply", lambda *_: 1 / 0)
                await run.until(lambda: run.at_rest)
            assert pid is not None
            assert not psutil.pid_exists(pid)
            assert run.machine.state is State.FATAL
            assert "ZeroDivisionError" in run.summary()["reason"]
            assert (run.summary()["outcome"], len(run.summary()["generations"])) == ("failed", 1)
            run.command(ev.CommandKind.START)
            await run.until(lambda: run.machine.state is State.RUNNING)

    asyncio.run(scenario())
    assert '"outcome": "stopped"' in (folder / "state/runs/run/summary.json").read_text()


def test_a_failing_wait_for_the_worker_ends_the_run(folder, monkeypatch) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=10**6, restart={"max_without_progress": 1})

    async def fail(*_: object) -> None:
        raise PermissionError("/proc")

    async def scenario() -> None:
        async with opened(settings) as running:
            run = await started(running)
            monkeypatch.setattr(child, "kill_orphans", fail)
            run.signal(signal.SIGKILL)
            await run.until(lambda: run.at_rest or run.machine.history.generation > 1)
            monkeypatch.undo()

    asyncio.run(scenario())


def test_a_failed_open_leaves_nothing_open(folder) -> None:
    read = read_settings(harness.write_settings(folder, args={}))
    state = StateDir(read.state_dir)
    (state.telemetry_socket / "in the way").mkdir(parents=True)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match=r"telemetry\.sock"):
        asyncio.run(Daemon(read, state).open())
    assert set(threading.enumerate()) <= before
    state.close()


class FailingObserver(Observer):
    def on_notice(self, notice: act.Notice) -> None:
        raise RuntimeError("the terminal is on fire")


def test_a_failing_display_is_dropped(folder) -> None:
    settings = harness.write_settings(folder, args={})

    async def scenario() -> None:
        async with opened(settings, FailingObserver()) as running:
            run = running.runs["run"]
            run.command(ev.CommandKind.START)
            await run.until(lambda: run.at_rest)
            assert run.machine.state is State.COMPLETED

    asyncio.run(scenario())


def test_a_failing_journal_is_reported_and_the_run_completes_with_its_summary(folder) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.02})
    observer = harness.NoticeList()

    async def scenario() -> None:
        async with opened(settings, observer) as running:
            run = await started(running)

            def full(*_: object) -> None:
                raise JournalError("no space left")

            for name in ("save_history", "close_generation", "generations"):
                setattr(running.shared.journal, name, full)
            await run.until(lambda: run.at_rest)
            summary = run.summary()
            assert (summary["outcome"], len(summary["generations"])) == ("completed", 1)

    asyncio.run(scenario())
    reported = [notice.text for notice in observer.notices if "no space left" in notice.text]
    assert len(reported) == len(set(reported)) == 2  # once each, not at every checkpoint
    assert '"cause": "completed"' in (folder / "state/runs/run/summary.json").read_text()


HOLD = [sys.executable, "-c", "x = b'x' * (40 << 20); print(flush=True); import time; time.sleep(3600)"]


@pytest.mark.parametrize("stuck", [True, False])
def test_a_worker_over_its_limit_is_killed_by_the_sampler_whatever_the_event_loop_does(stuck: bool) -> None:
    seen: list[ev.Event] = []
    seen_at_kill: list[int] = []

    def deliver(_: str, sample: ev.Sample | ev.SampleMissing) -> None:
        time.sleep(0.02)  # a worker that dies faster than its sample is delivered
        seen.append(sample)
        if not stuck:
            sampler.delivered()

    def kill() -> None:
        seen_at_kill.append(len(seen))
        os.killpg(worker.pid, signal.SIGKILL)

    with subprocess.Popen(HOLD, stdout=subprocess.PIPE, start_new_session=True) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        sampler = WorkerSampler(deliver)
        try:
            sampler.watch("run", 1, worker.pid, 30 << 20, 0.05, kill, confirm_samples=3)
            assert worker.wait(harness.PATIENCE_S) == -signal.SIGKILL
            sampler.unwatch("run")
            over = [each for each in seen if isinstance(each, ev.Sample) and each.footprint_bytes > 30 << 20]
        finally:
            sampler.close()
            worker.kill()
    assert seen_at_kill[0] == 2, "after the third sample, and before it was delivered"
    assert len(over) >= 3  # so that the machine can name the cause


def test_a_kill_over_the_limit_while_the_event_loop_is_stuck_counts_as_a_trip(folder) -> None:
    args = {"mode": "ramp", "at_step": 2, "mib_per_s": 100}
    settings = harness.write_settings(
        folder, args=args, batch={"size": 4}, memory={"limit": "120 MiB"}, restart={"max_without_progress": 1}
    )

    async def scenario() -> None:
        async with opened(settings) as running:
            run = await started(running)
            worker = psutil.Process(run.pid)
            deadline_s = time.monotonic() + harness.PATIENCE_S
            while worker.status() != psutil.STATUS_ZOMBIE:  # only the sampler's thread runs meanwhile
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            await run.until(lambda: run.machine.history.generation > 1)
            first = run.summary()["generations"][0]
            assert (first["cause"], first["ended"]) == ("memory pressure", "signal 9")
            assert run.machine.batch.size == 2

    asyncio.run(scenario())


def test_the_orphan_of_a_removed_run_is_ended_and_waited_for_when_the_run_is_added_again(folder, monkeypatch) -> None:
    settings = harness.write_settings(folder, args={}, restart={"stop_grace_s": 0, "term_grace_s": 0})
    monkeypatch.setattr(daemon, "UNKNOWN_ORPHAN_GRACE_S", 0.0)

    def orphan(running: Daemon) -> subprocess.Popen[bytes]:
        token = f"{time.monotonic_ns():032x}"
        process = subprocess.Popen(HOLD, start_new_session=True, env=os.environ | {TOKEN_VARIABLE: token})
        created_s = psutil.Process(process.pid).create_time()
        opened = OpenGeneration("lost", 1, process.pid, created_s, token, boot_id(), 1, 1, time.time())
        running.shared.journal.open_generation(opened)
        return process

    async def scenario() -> None:
        async with opened(settings) as running:
            process = orphan(running)
            running.recover()
            assert await asyncio.to_thread(process.wait, harness.PATIENCE_S) == -signal.SIGKILL
            process = orphan(running)
            text = settings.read_text()
            settings.write_text(text + text[text.index("[runs.run]") :].replace("runs.run", "runs.lost"))
            running.settings = read_settings(settings)
            run = await running.take_up("lost")
            assert process.wait(harness.PATIENCE_S) == -signal.SIGKILL
            assert run.machine.history.generation == 1
            assert running.shared.journal.open_generations() == []

    asyncio.run(scenario())


class MissingSamples(Observer):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def on_event(self, run: Run, event: ev.Event) -> None:
        if isinstance(event, ev.SampleMissing):
            self.reasons.append(event.reason)


def test_a_sampler_that_stopped_is_noticed_and_the_worker_restarted(folder, monkeypatch) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=10**6, memory={"missing_samples": 3})
    missing = MissingSamples()

    async def scenario() -> None:
        async with opened(settings, missing) as running:
            run = await started(running)
            run.housekeep()
            assert missing.reasons == [], "nothing is missing while samples arrive"
            running.shared.sampler.unwatch("run")
            monkeypatch.setattr(supervised_run, "SILENCE_S", 0.0)
            await run.until(lambda: run.machine.history.generation > 1)
            first = run.summary()["generations"][0]
            assert first["cause"] == "memory could not be measured"

    asyncio.run(scenario())
    assert [reason.startswith("no sample for ") for reason in missing.reasons[:3]] == [True] * 3
