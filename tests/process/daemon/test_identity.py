"""A run is identified by its settings file and its name: two projects never share checkpoints and results."""

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import platformdirs
import pytest
from tests.process import harness
from tests.process.conftest import SUPERVISORCTL, run_client
from tests.process.daemon.test_serve import serving

from mlx_supervisor.daemon.worker_process import newest_checkpoint
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import COMMAND_LINE, StateDir, left_behind, record_owner


@pytest.fixture
def state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that all projects share because the environment names it."""
    monkeypatch.setenv("MLX_SUPERVISOR_STATE_DIR", str(folder / "s"))
    return folder / "s"


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state folder, in an empty home folder. Nothing names another state folder."""
    monkeypatch.delenv("MLX_SUPERVISOR_STATE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "s"))
    return platformdirs.user_state_path("mlx-supervisor")


def project(folder: Path, state_dir: str = "") -> Path:
    """A project's settings file with one run called `run`."""
    folder.mkdir()
    settings = harness.write_settings(folder, args={})
    settings.write_text(settings.read_text().replace('state_dir = "state"', state_dir))
    return settings


def contents(state: Path) -> dict[str, bytes]:
    """Everything that the run saved, and its history."""
    files = {str(path): path.read_bytes() for path in sorted((state / "runs").rglob("*")) if path.is_file()}
    return files | {"history": json.dumps(history(state)).encode()}


def history(state: Path) -> dict[str, object]:
    with closing(sqlite3.connect(state / "journal.db")) as connection:
        loaded = json.loads(connection.execute("SELECT history FROM runs WHERE run = 'run'").fetchone()[0])
    assert isinstance(loaded, dict)
    return loaded


def test_two_projects_that_name_no_state_folder_are_two_runs(folder: Path, home: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    second.write_text(second.read_text().replace("seed = 7", "seed = 8"))
    with serving(first) as service:  # the second may run while the first state folder is in use
        assert service.ctl("start", "run").code == 0
        done = harness.run(second)
        assert (done.process.returncode, done.summary()["generations"][0]["first_step"]) == (0, 1)
        folders = sorted((home / "projects").iterdir())
        assert [each.name[:-6] for each in folders] == ["a-", "b-"]
        assert f"{folders[1]}/runs/run" in done.stderr
        assert "COMPLETED" in run_client([*SUPERVISORCTL, "-c", str(first), "info", "run"]).out.upper()
    assert harness.run(first, "--state-dir", str(folders[1])).process.returncode == 2
    assert harness.run(second, "--state-dir", str(home)).process.returncode == 0


def test_a_moved_project_is_a_new_run_and_says_where_the_old_one_is(folder: Path, home: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    (folder / "a").rename(folder / "b")
    moved = harness.run(folder / "b/settings.toml")
    old = next((home / "projects").glob("a-*"))
    assert f"Another one named 'run' is in {old}; its settings file {first.resolve()} no longer exists." in moved.stderr
    assert moved.summary()["generations"][0]["first_step"] == 1


def test_the_default_settings_file_has_the_users_state_folder_itself(folder: Path, home: Path) -> None:
    harness.run(project(folder / "a"))
    (folder / ".config").mkdir()
    default = project(folder / ".config/mlx-supervisor")
    assert harness.run(default).process.returncode == 0
    assert (home / "runs/run/summary.json").exists()
    assert read_settings(default).state_dir == home


def test_a_state_folder_without_its_lock_file_is_still_one(folder: Path, state: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    for name in ("supervisor.lock", "supervisor.log"):
        (state / name).unlink()
    assert harness.run(first).process.returncode == 0
    (folder / "foreign/runs").mkdir(parents=True)
    assert harness.run(first, "--state-dir", str(folder / "foreign")).process.returncode == 2


def test_a_second_project_does_not_get_the_results_of_the_first(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    assert harness.run(first).process.returncode == 0
    before = contents(state)
    refused = harness.run(second)
    assert refused.process.returncode == 2
    assert refused.stdout == ""
    assert (
        f"runs.run: the state folder {state} already holds a run named 'run' of {first.resolve()}; "
        f"this is {second.resolve()}. Rename this run, choose another --state-dir, or set that run aside with --fresh."
    ) in refused.stderr
    assert contents(state) == before
    again = harness.run(first).summary()
    assert again == json.loads(before[f"{state}/runs/run/summary.json"]) | {
        "reason": "already complete; nothing was trained"
    }


def test_fresh_gives_the_name_to_the_second_project(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    harness.run(first)
    done = harness.run(second, "--fresh")
    assert (done.process.returncode, done.summary()["generations"][0]["first_step"]) == (0, 1)
    assert (state / "runs/run.previous/saved").read_text() == "20"
    assert harness.run(first).process.returncode == 2


def test_the_daemon_refuses_another_projects_run(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    harness.run(first)
    before = contents(state)
    command = [sys.executable, "-m", "mlx_supervisor", "serve", "-c", str(second)]
    done = subprocess.run(
        command, env=harness.environment(), capture_output=True, text=True, check=False, timeout=harness.PATIENCE_S
    )
    assert done.returncode == 2
    assert f"of {first.resolve()}; this is {second.resolve()}. Rename this run" in done.stdout + done.stderr
    assert contents(state) == before


def test_a_run_added_later_to_a_daemon_is_refused_too(folder: Path) -> None:
    first = project(folder / "a", 'state_dir = "../state"')
    harness.run(first)
    second = folder / "settings.toml"
    text = first.read_text().replace("../state", "state")
    second.write_text(text.replace("runs.run", "runs.other"))
    with serving(second) as service:
        second.write_text(text + text[text.index("[runs.run]") :].replace("runs.run", "runs.other"))
        ran = service.ctl("update")
        assert ran.code != 0
        assert f"of {first.resolve()}; this is {second.resolve()}" in ran.out
        assert "other" in service.ctl("status").out


def test_a_moved_settings_file_is_refused_until_it_is_back(folder: Path, state: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    moved = first.rename(folder / "moved.toml")
    refused = harness.run(moved)
    assert refused.process.returncode == 2
    assert f"of {first.resolve()}, which no longer exists; this is {moved.resolve()}" in refused.stderr
    assert "move the file back" in refused.stderr
    moved.rename(first)
    assert harness.run(first).process.returncode == 0


def test_a_link_to_the_settings_file_is_the_same_run(folder: Path, state: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    (folder / "link").symlink_to(folder / "a")
    again = harness.run(folder / "link/settings.toml")
    assert again.process.returncode == 0
    assert len(again.summary()["generations"]) == 1


def test_the_history_of_an_older_version_is_adopted(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    harness.run(first)
    old = history(state)
    assert old.pop("settings_file") == str(first.resolve())
    with closing(sqlite3.connect(state / "journal.db")) as connection, connection:
        connection.execute("UPDATE runs SET history = ? WHERE run = 'run'", [json.dumps(old)])
    assert harness.run(first).process.returncode == 0
    assert history(state)["settings_file"] == str(first.resolve())
    assert harness.run(second).process.returncode == 2


def test_checkpoints_without_a_journal_stay_with_their_settings_file(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    harness.run(first)
    for path in state.glob("journal.db*"):
        path.unlink()
    (state / "runs/run/checkpoints/step-000000020").mkdir(parents=True)
    refused = harness.run(second)
    assert refused.process.returncode == 2
    assert f"of {first.resolve()}; this is {second.resolve()}" in refused.stderr
    first.write_text(first.read_text().replace("steps = 20", "steps = 25"))
    resumed = harness.run(first)
    assert resumed.summary()["generations"][0]["first_step"] == 21
    assert f"The journal has no history of this run; it resumes from the checkpoints in {state}" in resumed.stderr


def test_fresh_never_replaces_the_set_aside_run_of_another_project(folder: Path, state: Path) -> None:
    first, second = project(folder / "a"), project(folder / "b")
    harness.run(first)
    harness.run(second, "--fresh")  # sets aside the run of the first
    second.write_text(second.read_text().replace("steps = 20", "steps = 25"))
    harness.run(second, "--fresh")
    second.write_text(second.read_text().replace("steps = 25", "steps = 30"))
    harness.run(second, "--fresh")  # replaces its own older one
    saved = {path.parent.name: path.read_text() for path in (state / "runs").glob("*/saved")}
    assert saved == {"run": "30", "run.previous": "20", "run.previous.2": "25"}
    assert json.loads((state / "runs/run.previous/owner.json").read_text())["settings_file"] == str(first.resolve())


def test_fresh_after_a_start_without_a_checkpoint_keeps_the_finished_run(folder: Path, state: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    text = first.read_text()
    first.write_text(text.replace("[runs.run.task.args]", '[runs.run.task.args]\nmode = "refuse"'))
    refused = harness.run(first, "--fresh")
    assert refused.process.returncode == 2
    assert (
        f"The former run is kept in {state}/runs/run.previous; `mlx-supervisor export run.previous`" in refused.stderr
    )
    first.write_text(text)
    again = harness.run(first, "--fresh")
    assert (again.process.returncode, "The former run is kept" in again.stderr) == (0, False)
    assert (state / "runs/run.previous/saved").read_text() == "20"


def test_a_refused_change_is_no_restart_and_leaves_the_run_complete(folder: Path, home: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    text = first.read_text()
    changed = text.replace("steps = 20", "steps = 21")
    first.write_text(changed.replace("[runs.run.task.args]", '[runs.run.task.args]\nmode = "refuse"'))
    assert harness.run(first).process.returncode == 2
    first.write_text(text)
    again = harness.run(first).summary()
    assert (again["outcome"], again["reason"]) == ("completed", "already complete; nothing was trained")
    assert again["restarts"] == 0


def test_a_renamed_settings_file_is_a_new_run_that_names_the_old_one(folder: Path, home: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    renamed = first.rename(first.with_name("night.toml"))
    done = harness.run(renamed)
    assert f"its settings file {first.resolve()} no longer exists. If you moved it, move it back" in done.stderr


def test_a_run_without_a_settings_file_was_not_moved_while_its_folder_exists(folder: Path) -> None:
    state = folder / "projects"
    typed = folder / "a" / COMMAND_LINE
    typed.parent.mkdir()
    record_owner(StateDir(state / "a-1").run_dir("run"), "run", str(typed))
    for other in (folder / "b" / COMMAND_LINE, folder / "a/settings.toml", folder / "b/a" / COMMAND_LINE):
        assert left_behind(state / "b-1", "run", other) is None
    typed.parent.rmdir()
    assert left_behind(state / "b-1", "run", folder / "b" / COMMAND_LINE) == (str(typed), state / "a-1")


def test_fresh_without_anything_to_set_aside_keeps_the_older_one(folder: Path, state: Path) -> None:
    first = project(folder / "a")
    harness.run(first)
    harness.run(first, "--fresh")
    shutil.rmtree(state / "runs/run")
    harness.run(first, "--fresh")
    assert (state / "runs/run.previous/saved").read_text() == "20"


def test_a_run_whose_yaml_decides_its_steps_is_complete_until_that_or_the_settings_change(folder: Path) -> None:
    settings, config = folder / "settings.toml", folder / "lora.yaml"
    head = 'state_dir = "state"\n[runs.run.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n[runs.run.memory]\n'
    settings.write_text(head + "limit = '1 GiB'\n")
    config.write_text("iters: 20")

    def generations() -> int:
        done = harness.run(settings)
        assert (done.process.returncode, done.summary()["outcome"]) == (0, "completed"), done.stderr
        return len(done.summary()["generations"])

    assert generations() == 1
    again = harness.run(settings)
    assert "Already complete at step 20; nothing was trained. --fresh starts over." in again.stderr
    assert "run: completed at step 20 of 20: already complete; nothing was trained." in again.stderr
    assert len(again.summary()["generations"]) == 1
    config.write_text("iters: 20 # as before")
    asked = harness.run(settings).summary()
    assert (len(asked["generations"]), asked["reason"]) == (2, "already complete; nothing was trained")
    config.write_text("iters: 25")
    more = harness.run(settings).summary()
    assert (more["step"], len(more["generations"]), more["reason"]) == (25, 3, "all steps done")
    settings.write_text(head + "limit = '2 GiB'\n")
    assert generations() == 3, "the memory limit trains nothing"
    settings.write_text(head + "limit = '2 GiB'\n[runs.run]\nseed = 8\n")
    assert generations() == 4, "only the worker can tell"


def test_the_newest_checkpoint_is_the_last_complete_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") == 0
    for name in ("step-000000004", "step-000000012", ".step-000000016.tmp", "step-000000020.damaged", "notes"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == 12
