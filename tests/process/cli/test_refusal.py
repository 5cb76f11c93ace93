"""A refused start is printed, however slow the terminal is: no summary follows it."""

import os
import time
from pathlib import Path

import pytest

from mlx_supervisor.cli import nonblocking_stream
from mlx_supervisor.cli.request.exit_statuses import EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.cli.run import run

SETTINGS = 'state_dir = "state"\n[runs.a]\nsteps = 1\n[runs.a.task]\nkind = "python"\nentry = "no_such_module:build"\n'


def test_the_refusal_is_printed_before_the_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(SETTINGS)

    class SlowOs:
        @staticmethod
        def write(descriptor: int, data: bytes) -> int:
            time.sleep(0.3)
            return os.write(descriptor, data)

    monkeypatch.setattr(nonblocking_stream, "os", SlowOs)
    assert run(RunRequest(path), as_json=False, fresh=False) == EXIT_WRONG_SETTINGS
    assert "Not started: " in capfd.readouterr().out
