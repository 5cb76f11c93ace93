"""The seam to caffeinate, with a stand-in for the program."""

import os
import sys
from pathlib import Path

import pytest

from mlx_supervisor.host import caffeinate


def test_the_command_is_caffeinates() -> None:
    assert caffeinate.command_for(42) == ["/usr/bin/caffeinate", "-i", "-w", "42"]


@pytest.mark.skipif(sys.platform == "darwin", reason="there it is not a no-op")
def test_elsewhere_nothing_is_started() -> None:
    keeper = caffeinate.Caffeinate()
    assert keeper.hold(os.getpid()) is None
    assert keeper._process is None
    keeper.release()


def test_one_process_per_worker_and_none_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "caffeinate"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    program.chmod(0o755)
    monkeypatch.setattr(caffeinate, "CAFFEINATE", str(program))
    keeper = caffeinate.Caffeinate(enabled=True)
    assert keeper.hold(os.getpid()) is None
    first = keeper._process
    assert first is not None
    assert first.poll() is None
    assert keeper.hold(os.getpid()) is None
    assert first.poll() is not None
    second = keeper._process
    assert second is not None
    keeper.release()
    assert second.poll() is not None
    keeper.release()


def test_a_missing_program_is_said_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffeinate, "CAFFEINATE", "/nowhere/caffeinate")
    reason = caffeinate.Caffeinate(enabled=True).hold(1)
    assert reason is not None
    assert "may fall asleep" in reason
