"""Every mistake of the table is refused before the first update, with the file, the key or line, and what to do."""

import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.training.bad_inputs.cases import CASES, Case, make

from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.settings.to_job import job_of
from mlx_worker.errors import RefusedError

LIMIT_S = 3.0
WORKERS_OWN = [case for case in CASES if case.arguments == ("settings.toml",) and not case.trains]


def test_the_table_is_large_and_has_no_row_twice():
    assert len(CASES) >= 72
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.fixture
def project(tmp_path, llama_dir, monkeypatch):
    """Makes the project of a case; forgets its python task afterwards."""
    path = list(sys.path)

    def of(case: Case) -> Path:
        make(tmp_path / "project", llama_dir / "model", case)
        return tmp_path / "project"

    yield of
    sys.path[:] = path
    sys.modules.pop("mine", None)


def refusal_of(folder: Path) -> str:
    """What the supervisor refuses, else what the worker does; in one process, without training."""
    from mlx_worker.tasks import mistakes
    from mlx_worker.training import inputs, loop

    try:
        settings, _ = RunRequest(folder / "settings.toml", "run").read()
        run = settings.runs["run"]
        size = run.batch.size
        spawn = Spawn(1, size, None if size is None else size * run.batch.accumulation)
        job = job_of(settings, "run", folder / "run", None, spawn, None)
        with mistakes.refused(job, lambda: 0):
            loop.prepare(job, inputs.read(job))
    except (SettingsError, RefusedError) as error:
        return " ".join(str(error).split())
    raise AssertionError("accepted")


@pytest.mark.parametrize("case", WORKERS_OWN, ids=lambda case: case.name)
def test_the_message_names_place_and_remedy(project, case):
    text = refusal_of(project(case))
    assert [words for words in case.words if words not in text] == [], text


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_command_says_it_once_and_exits_with_2_within_3_s(project, case, capsys):
    folder = project(case)
    before_s, started_s = _seconds_of_children(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mlx_supervisor", "run", *case.arguments],
        cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "400"},
    )  # fmt: skip
    wall_s, busy_s = time.monotonic() - started_s, _seconds_of_children() - before_s
    output = done.stdout + done.stderr
    with capsys.disabled():
        print(f"\n{wall_s:5.2f} s, {busy_s:4.2f} s busy, exit {done.returncode}: {output.splitlines()[-1][:500]}")
    assert done.returncode == 2, output
    assert [words for words in case.words if words not in output] == [], output
    assert output.count(case.words[-1]) == 1, output
    assert "Traceback" not in output
    assert "step 0 of 0" not in output
    assert busy_s <= LIMIT_S, "processor time: other processes do not count"


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
