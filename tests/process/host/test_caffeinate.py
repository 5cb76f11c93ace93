"""caffeinate, with a fake program."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from mlx_supervisor.host import caffeinate


def test_the_command_line() -> None:
    assert caffeinate.command_for(42) == ["/usr/bin/caffeinate", "-i", "-w", "42"]


@pytest.mark.skipif(sys.platform == "darwin", reason="starts the real caffeinate")
def test_elsewhere_no_process_is_started() -> None:
    before = psutil.Process().children()
    keeper = caffeinate.Caffeinate()
    assert keeper.hold(os.getpid()) is None
    assert psutil.Process().children() == before
    keeper.release()


def test_one_process_per_worker_ended_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "caffeinate"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    program.chmod(0o755)
    monkeypatch.setattr(caffeinate, "CAFFEINATE", str(program))
    before = set(psutil.Process().children())
    keeper = caffeinate.Caffeinate(enabled=True)
    assert keeper.hold(os.getpid()) is None
    (first,) = set(psutil.Process().children()) - before
    assert keeper.hold(os.getpid()) is None
    (second,) = set(psutil.Process().children()) - before
    assert second != first
    for _ in range(2):
        keeper.release()
        assert set(psutil.Process().children()) == before


def test_a_missing_program_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffeinate, "CAFFEINATE", "/nowhere/caffeinate")
    reason = caffeinate.Caffeinate(enabled=True).hold(1)
    assert reason is not None
    assert "may fall asleep" in reason
