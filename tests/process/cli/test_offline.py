"""`status`, `logs`, `history` and `compare` read a run's journal and folder; no supervisor is needed."""

import csv
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.process import harness

from mlx_supervisor.cli.offline.compare import compare, settings_of, side_of
from mlx_supervisor.cli.offline.history import history
from mlx_supervisor.cli.offline.logs import logs
from mlx_supervisor.cli.offline.places import UsageError, find
from mlx_supervisor.cli.offline.runs import chosen
from mlx_supervisor.cli.offline.status import age_text, lines_of, report_of, status


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder that is also the current one."""
    monkeypatch.delenv("MLX_SUPERVISOR_STATE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "s"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A folder with a run that completed in its second generation."""
    with tempfile.TemporaryDirectory(prefix="off") as name:
        settings = harness.write_settings(Path(name), args={"mode": "self_kill", "at_step": 8})
        assert harness.run(settings).process.returncode == 0
        yield Path(name)


@pytest.fixture
def finished(template: Path, home: Path) -> Path:
    """The settings file of a completed run."""
    shutil.copytree(template, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
    return home / "settings.toml"


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((finished.parent / "state/runs/run/summary.json").read_text())
    assert status([], None, as_json=False) == 0
    shown = printed(capsys)
    assert f"State folder: {finished.parent.resolve()}/state (settings: {finished})" in shown
    assert "run  completed    step 20/20, loss " in shown
    assert shown.endswith(", 1 restart\n  all steps done\n"), "not the error of the first generation"

    assert history([], None, as_csv=False, as_json=True) == 0
    (found,) = json.loads(printed(capsys))
    assert (found["run"], found["state"], found["step"], found["trips"]) == ("run", "completed", 20, 0)
    for each, record in zip(found["generations"], summary["generations"], strict=True):
        assert {"exit": each["exit"]} == {"exit": record["ended"]}
        assert {key: each[key] for key in record if key != "ended"} == {
            key: value for key, value in record.items() if key != "ended"
        }
    assert found["generations"][-1]["loss"] == pytest.approx(summary["loss"])

    assert history([], None, as_csv=True, as_json=False) == 0
    rows = list(csv.DictReader(io.StringIO(printed(capsys))))
    assert [row["generation"] for row in rows] == ["1", "2"]
    assert rows[0]["exit"] == "signal 9"
    started, ended, again = (
        datetime.fromisoformat(text) for text in (rows[0]["started"], rows[0]["ended"], rows[1]["started"])
    )
    assert started <= ended <= again + timedelta(seconds=1), "two clocks, in whole seconds"

    assert history([], None, as_csv=False, as_json=False) == 0
    table = printed(capsys).splitlines()
    assert table[0].startswith("run: completed, step 20 of 20, loss ")
    assert table[-1].endswith("completed (exit code 0)")


def test_steps_that_no_supervisor_saw_count_once_the_run_has_ended(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(finished.parent / "state/journal.db")) as connection, connection:
        connection.execute("DELETE FROM steps WHERE step > 12")
    assert status([], None, as_json=False) == 0
    assert "run  completed    step 20/20, loss " in printed(capsys)


def test_without_its_settings_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished.unlink()
    assert status([], None, as_json=False) == 1, "nothing leads to the folder"
    assert "No run yet in" in capsys.readouterr().err
    assert status(["run"], finished.parent / "state", as_json=True) == 0
    assert [run["state"] for run in json.loads(printed(capsys))] == ["completed"]


@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "another program's", "newer"])
def test_a_journal_that_cannot_be_read(finished: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    journal = finished.parent / "state/journal.db"
    content = journal.read_bytes()
    journal.unlink()
    if damage == "garbage":
        journal.write_bytes(b"garbage")
    elif damage == "cut":
        journal.write_bytes(content[: len(content) // 2])
    elif damage != "missing":
        with closing(sqlite3.connect(journal)) as connection:
            connection.execute("CREATE TABLE t (x)")
            connection.execute(f"PRAGMA user_version = {99 if damage == 'newer' else 0}")
    before = journal.read_bytes() if journal.exists() else None
    assert status([], None, as_json=False) == 0
    shown = capsys.readouterr()
    assert "run  completed    step 20/20" in shown.out, "from summary.json"
    assert str(journal.resolve()) in shown.err
    assert history([], None, as_csv=False, as_json=False) == 0
    assert compare(("run", "run"), None, as_json=False) == 0
    assert before == (journal.read_bytes() if journal.exists() else None), "reading must not repair"


@pytest.mark.parametrize(
    ("age_s", "usual_s", "text"),
    [
        (45.7, 0.5, "last update 45 s ago"),
        (9.9, 0.5, ""),
        (45.0, 5.0, ""),
        (45.0, None, ""),
        (130.0, 0.1, "last update 2m10s ago"),
    ],
)
def test_an_update_that_is_late_shows_its_age(age_s: float, usual_s: float | None, text: str) -> None:
    assert age_text(age_s, usual_s) == text


def test_while_it_runs_and_after_its_supervisor_died(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = harness.write_settings(home, args={"delay_s": 0.05}, steps=10_000)
    with harness.Foreground(settings) as foreground:
        foreground.until("Ready at step 0")
        harness.eventually(lambda: harness.journaled_steps(home) > 3)
        assert status([], None, as_json=True) == 0
        (live,) = json.loads(printed(capsys))
        assert (live["state"], live["generation"], live["target_steps"]) == ("running", 1, 10_000)
        assert live["step"] >= 3
        assert live["footprint_bytes"] > 0
        assert 0.05 <= live["usual_step_s"] < 5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: datetime.fromisoformat(live["step_at"]).timestamp() + 100)
            assert status([], None, as_json=False) == 0
        assert ", last update 1m" in printed(capsys)
        assert status([], None, as_json=False) == 0
        assert f"generation 1, pid {live['pid']}, up " in printed(capsys)
        assert history([], None, as_csv=False, as_json=False) == 0
        assert printed(capsys).rstrip().endswith("running")
        (read_before,) = chosen(find([], None).places, [])
        foreground.process.kill()
        foreground.process.wait()
        harness.eventually(lambda: status([], None, as_json=True) == 0 and '"interrupted"' in printed(capsys))
        assert status([], None, as_json=False) == 0
        assert "its supervisor ended without finishing it; start it again to resume" in printed(capsys)
        shown = lines_of(read_before, report_of(read_before), width=3)
        assert f"pid {live['pid']}, up " in shown[0], "one state of the run, also if it ends while it is shown"


def test_a_killed_supervisor_leaves_the_new_target_and_no_error_of_an_earlier_generation(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.run(harness.write_settings(home, args={})).process.returncode == 0
    crashes_once = {"mode": "crash", "at_step": 60, "generations": 2, "delay_s": 0.05, "save_every": 10**6}
    settings = harness.write_settings(home, args=crashes_once, steps=10_000)
    with harness.Foreground(settings) as foreground:

        def report() -> dict[str, Any]:
            assert status([], None, as_json=True) == 0
            (found,) = json.loads(printed(capsys))
            assert isinstance(found, dict)
            return found

        foreground.until("Ready at step 20 of")
        harness.eventually(lambda: "usual_step_s" in report())
        assert report()["target_steps"] == 10_000
        foreground.until("the user's code is broken")
        harness.eventually(lambda: report()["generation"] == 3 and "usual_step_s" in report())
        foreground.process.kill()
        foreground.process.wait()
        harness.eventually(lambda: report()["state"] == "interrupted")
        assert report()["error"] == ""
        assert status([], None, as_json=False) == 0
        assert "broken" not in printed(capsys)


def test_each_metric_is_shown_once(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(finished.parent / "state/journal.db")) as connection, connection:
        (text,) = connection.execute("SELECT history FROM runs").fetchone()
        metrics = {"metrics": {"grad_norm": 1.25}, "validation_metrics": {"accuracy": 0.9}}
        connection.execute("UPDATE runs SET history = ?", (json.dumps(json.loads(text) | metrics),))
    assert status([], None, as_json=False) == 0
    shown = printed(capsys)
    assert [shown.count(each) for each in ("grad_norm", "accuracy")] == [1, 1]
    assert ", grad_norm=1.25, " in shown
    assert ", validation accuracy=0.9\n" in shown


def test_logs_end_with_what_was_written_last(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.parent / "state/runs/run/logs"
    written = (folder / "stdout.log").read_text().splitlines()
    assert logs([], None, follow=False, stderr=False, lines=3) == 0
    assert printed(capsys).splitlines() == written[-3:]
    (folder / "stdout.log").rename(folder / "stdout.log.1")
    (folder / "stdout.log").write_text("newest\n")
    assert logs(["run"], None, follow=False, stderr=False, lines=2) == 0
    assert printed(capsys).splitlines() == [written[-1], "newest"]
    (folder / "stderr.log").write_text("a traceback\n")
    assert logs([str(finished), "run"], None, follow=False, stderr=True, lines=5) == 0
    assert printed(capsys) == "a traceback\n"
    shutil.rmtree(folder)
    assert logs([], None, follow=False, stderr=False, lines=3) == 1
    assert "no log yet; run is completed" in capsys.readouterr().err


def test_two_runs_are_compared(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = finished.parent / "other"
    other.mkdir()
    settings = harness.write_settings(other, args={"mode": "normal"}, steps=15)
    assert harness.run(settings).process.returncode == 0
    assert compare((str(finished), str(settings)), None, as_json=True) == 0
    found = json.loads(printed(capsys))
    assert found["settings"] == {
        "steps": [20, 15],
        "task.args.mode": ["self_kill", "normal"],
        "task.args.at_step": [8, None],
    }
    first, second = found["runs"]
    assert (first["step"], first["restarts"], second["step"], second["restarts"]) == (20, 1, 15, 0)
    assert found["losses"][-1]["last_step"] == 15
    assert compare(("run", f"{settings}:run"), None, as_json=False) == 0
    shown = printed(capsys)
    assert ["steps", "20", "15"] in [line.split() for line in shown.splitlines()]
    assert ["restarts", "1", "0"] in [line.split() for line in shown.splitlines()]
    copied = shutil.copytree(other / "state/runs/run", finished.parent / "copied")
    assert compare(("run", str(copied / "summary.json")), None, as_json=False) == 0
    assert "no common steps in the journals" in printed(capsys)
    assert compare((str(other / "state"), str(other / "state/runs/run")), None, as_json=False) == 0
    shown = printed(capsys)
    assert "Settings: equal" in shown
    assert "equal in every bit at all 15 common steps" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothere"], "no run 'nothere' in"),
        (["nothere.toml"], "no such file"),
    ],
)
def test_what_does_not_exist_is_named(finished: Path, words: list[str], expected: str) -> None:
    with pytest.raises((UsageError, ValueError), match=expected):
        status(words, None, as_json=False)


def test_an_unknown_name_lists_some_runs_only(finished: Path) -> None:
    for number in range(20):
        (finished.parent / f"state/runs/run-{number:02}").mkdir()
    with pytest.raises(UsageError, match=r"there are: run, run-00, .*, run-10 and 9 more$"):
        logs(["nosuch"], None, follow=False, stderr=False, lines=1)


def test_several_runs_must_be_named(home: Path) -> None:
    settings = harness.write_settings(home, args={})
    text = settings.read_text()
    settings.write_text(text + text[text.index("[runs.run]") :].replace("runs.run", "runs.other"))
    with pytest.raises(UsageError, match=r"several runs: run in .*; other in .*; name one"):
        logs([], None, follow=False, stderr=False, lines=1)


def test_two_runs_of_a_file_are_named_in_the_form_that_compare_reads(template: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(template / "state", state, ignore=shutil.ignore_patterns("*.sock"))
    shutil.copytree(state / "runs" / "run", state / "runs" / "other")
    with pytest.raises(UsageError) as refused:
        side_of(str(state), None)
    assert f"has 2 runs; name one: {state}:run or {state}:other" in str(refused.value)
    assert side_of(f"{state}:run", None).shown


def test_a_settings_file_of_any_name_here_is_found(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished.rename(finished.with_name("mine.toml"))
    (finished.parent / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert status([], None, as_json=True) == 0
    assert [run["run"] for run in json.loads(printed(capsys))] == ["run"]


def test_the_command_line(finished: Path) -> None:
    environment = dict(os.environ)
    command = [sys.executable, "-m", "mlx_supervisor"]
    done = subprocess.run([*command, "status"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "run  completed" in done.stdout) == (0, True)
    done = subprocess.run([*command, "logs", "x.toml"], capture_output=True, text=True, check=False)
    assert (done.returncode, "x.toml: no such file" in done.stderr) == (2, True)


def test_from_anywhere_every_project_is_shown(template: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = home / "s/mlx-supervisor"
    for place in (base, base / "projects/a-123456", base / "projects/b-123456"):
        shutil.copytree(template / "state", place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
    (base / "projects/empty").mkdir()
    mistyped = base / "projects/b-123456/runs/mistyped"
    mistyped.mkdir()
    (mistyped / "summary.json").write_text('{"outcome": "failed", "step": 0}')
    assert status([], None, as_json=False) == 0
    text = printed(capsys)
    assert text.count(f"(settings: {template.resolve()}/settings.toml)") == 3
    assert text.endswith("\nLeft out: 1 run without an update; name one to see it.\n")
    assert "mistyped" not in text
    shutil.rmtree(mistyped)
    assert status([], None, as_json=True) == 0
    shown = [Path(run["state_dir"]).name for run in json.loads(printed(capsys))]
    assert shown == ["mlx-supervisor", "a-123456", "b-123456"]
    with pytest.raises(UsageError, match="several runs"):
        logs(["run"], None, follow=False, stderr=False, lines=1)
    assert logs(["run", str(base / "projects/a-123456")], None, follow=False, stderr=False, lines=1) == 0


def test_a_refused_start_changes_nothing_that_is_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = harness.write_settings(home, args={})
    assert harness.run(settings).process.returncode == 0
    before = json.loads((home / "state/runs/run/summary.json").read_text())
    harness.write_settings(home, args={"mode": "refuse"}, steps=30)
    done = harness.run(settings)
    assert (done.process.returncode, done.summary()["outcome"]) == (2, "failed")
    assert status([], None, as_json=False) == 0
    lines = printed(capsys).splitlines()
    assert "run  completed    step 20/20, " in lines[1]
    assert lines[2:] == ["  all steps done", "  the last start was refused: data/train.jsonl:3: empty line"]
    assert history([], None, as_csv=False, as_json=False) == 0
    shown = printed(capsys)
    assert shown.startswith("run: completed, step 20 of 20, ")
    assert "refused its job" not in shown
    assert compare(("run", "run"), None, as_json=True) == 0
    after = json.loads((home / "state/runs/run/summary.json").read_text())
    changed = {key for key in before if before[key] != after[key]} - {"generations", "goodput"}
    assert (changed, settings_of(home / "state/runs/run")["steps"]) == (set(), 20)


def test_a_log_is_followed_until_ctrl_c(finished: Path) -> None:
    log = finished.parent / "state/runs/run/logs/stdout.log"
    command = [sys.executable, "-u", "-m", "mlx_supervisor", "logs", "-f", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == log.read_text().splitlines()[-1] + "\n"
        with log.open("a") as file:
            file.write("appended\n")
        assert client.stdout.readline() == "appended\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(harness.PATIENCE_S) == 0


def test_validations_are_compared(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(finished.parent / "state/journal.db")) as connection, connection:
        for step, loss in ((10, 2.5), (20, 2.25), (20, 2.125)):
            fields = json.dumps({"step": step, "loss": loss})
            row = ("run", 2, "validation", "info", "", fields, 0.0)
            names = "run, generation, kind, level, text, fields, wall_s"
            connection.execute(f"INSERT INTO events ({names}) VALUES (?,?,?,?,?,?,?)", row)
    assert compare(("run", "run"), None, as_json=True) == 0
    found = json.loads(printed(capsys))["validations"]
    assert found == [{"step": 10, "a": 2.5, "b": 2.5}, {"step": 20, "a": 2.125, "b": 2.125}]


def test_what_was_started_over_is_in_the_history_only(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = finished.parent / "state/runs"
    for name in ("run.previous", "run.previous.2"):
        shutil.copytree(runs / "run", runs / name)
    assert status([], None, as_json=True) == 0
    assert [run["run"] for run in json.loads(printed(capsys))] == ["run"]
    assert logs([], None, follow=False, stderr=False, lines=1) == 0
    capsys.readouterr()
    assert history([], None, as_csv=False, as_json=True) == 0
    found = json.loads(printed(capsys))
    assert [run["run"] for run in found] == ["run", "run.previous", "run.previous.2"]
    assert [len(run["generations"]) for run in found] == [2, 2, 2]
    assert compare(("run", str(runs / "run.previous")), None, as_json=False) == 0
    assert "Settings: equal" in printed(capsys)


def test_export_asks_the_worker_and_has_its_exit_status(finished: Path) -> None:
    command = [sys.executable, "-m", "mlx_supervisor", "export", "run", "--step", "7", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{finished.parent.resolve()}/state/runs/run/checkpoints: no checkpoint yet\n"
    assert not (finished.parent / "out").exists()


def test_a_generation_has_at_most_one_trip(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the supervisor counts: a soft trip and the hard one after it are one, and the kernel's kill is one."""
    with closing(sqlite3.connect(finished.parent / "state/journal.db")) as connection, connection:
        names = "run, generation, kind, level, text, fields, wall_s"
        for hard in (False, True):
            row = ("run", 1, "trip", "warning", "", json.dumps({"hard": hard}), 0.0)
            connection.execute(f"INSERT INTO events ({names}) VALUES (?,?,?,?,?,?,?)", row)
        (record,) = connection.execute("SELECT record FROM generations WHERE generation = 2").fetchone()
        killed = json.dumps(json.loads(record) | {"cause": "killed by the kernel for memory"})
        connection.execute("UPDATE generations SET record = ? WHERE generation = 2", (killed,))
    assert history([], None, as_csv=False, as_json=True) == 0
    assert [each["trips"] for each in json.loads(printed(capsys))[0]["generations"]] == [1, 1]
