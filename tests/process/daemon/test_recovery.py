"""Never two workers of one run: checks before a supervisor starts one."""

import asyncio
import sys
from pathlib import Path

import pytest
from tests.core.policies import DEFAULTS
from tests.process import harness

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.daemon import recovery
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.recorder import Recorder, load_history
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.logs.run_log import RunLog
from mlx_supervisor.process import launch
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import StateDir


def _journal(folder: Path) -> Journal:
    return Journal(folder / "journal.db", lambda text: pytest.fail(text))


@pytest.mark.parametrize("history", [RunHistory(generation=3).snapshot(), {"generation": "three"}, None])
@pytest.mark.parametrize("closed", [True, False])
def test_no_number_of_a_generation_is_used_twice(
    tmp_path: Path, history: dict[str, object] | None, closed: bool
) -> None:
    """The history may be older than the last start: a disk was full, or locked."""
    journal = _journal(tmp_path)
    journal.open_generation(OpenGeneration("run", 5, 7, 1.0, "token", "boot", None, None, 1.0))
    journal.open_generation(OpenGeneration("another", 9, 7, 1.0, "token", "boot", None, None, 1.0))
    if closed:
        journal.close_generation("run", 5, {"ended": "signal 9"})
    if history is not None:
        journal.save_history("run", history)
    assert load_history(journal, "run").generation == 5
    journal.close()


def test_no_worker_starts_without_a_journal_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.WORKER_VARIABLE, f"{sys.executable} {harness.MISBEHAVE}")
    read = read_settings(harness.write_settings(tmp_path, args={}))
    state = StateDir(read.state_dir)

    def full(*_: object) -> None:
        raise JournalError("no space left")

    async def scenario() -> None:
        daemon = Daemon(read, state)
        await daemon.open()
        try:
            run = daemon.runs["run"]
            monkeypatch.setattr(daemon.shared.journal, "open_generation", full)
            run.command(ev.CommandKind.START)
            assert (run.machine.state, run.pid) == (State.BACKOFF, None)
            monkeypatch.undo()
            monkeypatch.setenv(launch.WORKER_VARIABLE, f"{sys.executable} {harness.MISBEHAVE}")
            await run.until(lambda: run.at_rest)
            assert run.machine.state is State.COMPLETED
        finally:
            await daemon.close()
            state.close()

    asyncio.run(asyncio.wait_for(scenario(), harness.PATIENCE_S))


ORPHAN = OpenGeneration("run", 4, 4242, 1.0, "token", boot_id(), None, None, 1.0)


@pytest.mark.parametrize("hurries", [True, False])
def test_a_worker_that_survives_sigkill_is_waited_for_and_reported_once(
    monkeypatch: pytest.MonkeyPatch, hurries: bool
) -> None:
    polls: list[int] = []
    notices: list[act.Notice] = []

    async def killed(*_: object) -> bool:
        return True

    async def orphans_left(*_: object, **__: object) -> bool:
        polls.append(1)
        return len(polls) < 4

    monkeypatch.setattr(recovery, "end_orphaned_worker", killed)
    monkeypatch.setattr(recovery, "kill_orphans", orphans_left)
    ended = asyncio.run(
        recovery.end_orphaned_generation(ORPHAN, 0.0, lambda: hurries and len(polls) > 1, notices.append)
    )
    assert ended is not hurries
    assert [notice.kind for notice in notices].count("survivor") == 1
    assert len(polls) == (2 if hurries else 4)


def test_starts_are_blocked_while_an_unkillable_worker_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_settings(harness.write_settings(tmp_path, args={}))
    state = StateDir(read.state_dir)

    ended = asyncio.Event()

    async def ends(*arguments: object) -> bool:
        if arguments[1] != 0.0:  # the first call is hurried
            return False
        await ended.wait()
        return True

    monkeypatch.setattr("mlx_supervisor.daemon.recovery.end_orphaned_generation", ends)
    monkeypatch.setenv(launch.WORKER_VARIABLE, f"{sys.executable} {harness.MISBEHAVE}")

    async def scenario() -> None:
        daemon = Daemon(read, state)
        await daemon.open()
        try:
            run = daemon.runs["run"]
            await run.recovery.recover([ORPHAN])
            run.command(ev.CommandKind.START)
            assert (run.at_rest, run.pid) == (True, None)
            ended.set()
            await run.until(lambda: run.machine.current is None and run.summary()["generations"] != [])
            run.command(ev.CommandKind.START)
            await run.until(lambda: run.at_rest)
            assert run.machine.state is State.COMPLETED
        finally:
            await daemon.close()
            state.close()

    asyncio.run(asyncio.wait_for(scenario(), harness.PATIENCE_S))


def test_a_generation_that_cannot_be_killed_stays_open_for_the_next_supervisor(tmp_path: Path) -> None:
    journal = _journal(tmp_path)
    recorder = Recorder("run", journal, RunLog(tmp_path))
    journal.open_generation(OpenGeneration("run", 5, 7, 1.0, "token", "boot", None, None, 1.0))
    recorder.close_generation(act.CloseGeneration(5, {"ended": "not killable"}, alive=True))
    assert [orphan.generation for orphan in journal.open_generations()] == [5]
    assert [record["ended"] for record in recorder.generations()] == ["not killable"]
    recorder.close_generation(act.CloseGeneration(5, {"ended": "not killable"}))
    assert journal.open_generations() == []
    journal.close()


@pytest.mark.parametrize(
    ("seen", "saved", "expected"),
    [((3, 332), 336, (3, 336)), ((3, 332), 330, (3, 332)), ((0, 0), 336, (333, 336)), ((0, 0), 332, (0, 0))],
)
def test_updates_that_no_supervisor_saw_belong_to_the_lost_generation(
    seen: tuple[int, int], saved: int, expected: tuple[int, int]
) -> None:
    machine = Run(DEFAULTS, RunHistory(generation=4, highest_step=332))
    lost = recovery.trained_on(ev.Recovered(1.0, 4, False, *seen), machine, saved)
    assert (lost.first_step, lost.last_step) == expected
