"""What a command line means: the run, its options, the command that resumes it, and the settings file of `init`."""

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mlx_supervisor.cli.request.init import settings_text, write_settings
from mlx_supervisor.cli.request.options import MLX_LM, takes_run
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.settings.to_job import job_of

PYTHON_RUN = '[runs.{0}]\nsteps = 4\n[runs.{0}.task]\nkind = "python"\nentry = "a:b"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_SUPERVISOR_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "lora.yaml").write_text("iters: 5\n")
    (tmp_path / "data").mkdir()
    return tmp_path


def parsed(line: str) -> RunRequest:
    """The request in a command line."""
    found = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @takes_run
    def run(request: RunRequest) -> None:
        found.append(request)

    result = CliRunner().invoke(app, shlex.split(line))
    if not found:
        raise ValueError(result.output)
    return found[0]


@pytest.mark.parametrize(
    "line",
    [
        "lora.yaml --iters 7 --num-layers -1 --learning-rate 0.001 --mask-prompt --state-dir 's d'",
        "lora.yaml night --fine-tune-type dora --memory-limit '12 GiB' --mlx-lm-compatible",
        "--name b --model 'my model' --data data --report-to wandb,swanlab",
        "settings.toml",
    ],
)
def test_the_printed_command_names_the_same_run(line: str) -> None:
    request = parsed(line)
    command = shlex.split(request.command())
    assert command[:2] == ["mlx-supervisor", "run"]
    assert parsed(shlex.join(command[2:])) == request
    assert sorted(command[2:]) == sorted(shlex.split(line))


def test_the_configuration_file_can_be_named_as_for_mlx_lm(project: Path) -> None:
    assert parsed("--train --config lora.yaml") == RunRequest(Path("lora.yaml"), options={"train": True})
    assert parsed("-c lora.yaml").file == Path("lora.yaml")
    with pytest.raises(ValueError, match=r"--config: found lora\.yaml besides the file a\.toml"):
        parsed("a.toml -c lora.yaml")


def test_paths_start_at_the_current_folder_and_names_on_the_hub_stay(project: Path) -> None:
    request = parsed("--model org/name --data data --adapter-path out --resume-adapter-file ~/a.safetensors")
    settings, name = request.read()
    options = settings.runs[name].task.options
    assert (options["model"], options["data"]) == ("org/name", str(project / "data"))
    assert options["adapter_path"] == str(project / "out")
    assert options["resume_adapter_file"] == str(Path("~/a.safetensors").expanduser())


def test_options_override_the_options_of_the_settings(project: Path) -> None:
    task = 'kind = "mlx_lm"\nconfig = "lora.yaml"\noptions = { iters = 1, seed = 2 }\n'
    (project / "s.toml").write_text(f"[runs.a]\n[runs.a.task]\n{task}")
    settings, name = parsed("s.toml --iters 9 --memory-limit 0.5 --mlx-lm-compatible").read()
    assert settings.runs[name].memory.limit == 0.5
    found = job_of(settings, name, Path("/run"), None, Spawn(1, None, None), None).task
    assert found.options == {"iters": 9, "seed": 2}
    assert found.mlx_lm_compatible
    assert found.options_from == {"iters": "--iters", "seed": f"{project / 's.toml'}: runs.a.task.options.seed"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "mlx-supervisor run lora.yaml "),
        ("--iters 3", "--model and --data: found nothing"),
        ("lora.yaml --memory-limit lots", '--memory-limit: found "lots"; allowed: '),
        ("lora.yaml --memory-limit 12", '--memory-limit: found "12"; allowed: at least 64 MiB'),
        ("lora.yaml all", 'NAME: found the run name "all"'),
        ("p.toml --iters 3", '--iters: found an option of mlx_lm.lora; allowed: only for kind "mlx_lm"'),
        ("m.toml --iters 3", r"m.toml: --iters: runs.a.steps = 4 overrides it"),
        ("p.toml --mlx-lm-compatible", "--mlx-lm-compatible: found with a run of another kind; allowed: only for kind"),
        ("two.toml", "runs: no name given; allowed: a, b"),
        ("lora.yml", "lora.yml: no such file; did you mean lora.yaml?"),
        ("lora", "lora: no such file; did you mean lora.yaml?"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(project: Path, line: str, expected: str) -> None:
    (project / "p.toml").write_text(PYTHON_RUN.format("a"))
    (project / "two.toml").write_text(PYTHON_RUN.format("a") + PYTHON_RUN.format("b"))
    (project / "m.toml").write_text('[runs.a]\nsteps = 4\n[runs.a.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n')
    with pytest.raises(SettingsError) as refused:
        parsed(line).read()
    assert expected in str(refused.value)


def test_the_commands_and_their_mistakes(project: Path) -> None:
    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_supervisor", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    misspelt = typed("run", "lora.yaml", "--iter", "5")
    assert (misspelt.returncode, "--iters" in misspelt.stderr) == (2, True)
    nothing = typed("run")
    assert (nothing.returncode, "In this folder: lora.yaml" in nothing.stderr) == (2, True)
    forgotten = typed("lora.yaml", "--iters", "5")
    assert (forgotten.returncode, "did you mean: mlx-supervisor run lora.yaml --iters 5" in forgotten.stderr) == (
        2,
        True,
    )
    commands = typed("--help").stdout
    assert "..." not in commands.partition("Commands:")[2]
    assert all(f"\n  {name} " in commands for name in ("run", "train", "init", "serve"))
    assert not (project / "state").exists()


@pytest.mark.parametrize(
    "line",
    [
        "lora.yaml",
        "lora.yaml --iters 9 --learning-rate 1e-4 --mask-prompt --memory-limit 0.5",
        "--model org/name --data data --name night.1 --mlx-lm-compatible",
    ],
)
def test_the_file_that_init_writes_is_the_same_run(project: Path, line: str) -> None:
    request = parsed(line)
    settings, name = request.read()
    assert write_settings(request, Path("written.toml")) == 0
    written = read_settings(Path("written.toml"))
    assert list(written.runs) == [name]
    jobs = [job_of(each, name, Path("/run"), None, Spawn(1, None, None), None) for each in (settings, written)]
    first, second = ({"seed": job.seed, "from": job.seed_from_task, "memory": job.memory,
                      "options": job.task.options, "base": job.task.base_dir} for job in jobs)  # fmt: skip
    assert first == second
    assert jobs[0].task.mlx_lm_compatible == jobs[1].task.mlx_lm_compatible == ("--mlx-lm-compatible" in line)
    assert written.runs[name].memory == settings.runs[name].memory
    assert Path(jobs[0].task.config or "") == Path(jobs[1].task.config or "")


def test_init_keeps_the_adapters_that_a_finished_run_delivered(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = project / "state/runs/lora/summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"exported_to": str(project / "adapters")}))
    assert "adapter_path" not in read_settings(written("none.toml")).runs["lora"].task.options
    for folder in ("adapters", "adapters-2"):
        (project / folder).mkdir()
    (project / "adapters/adapters.safetensors").write_text("finished")
    assert read_settings(written("one.toml")).runs["lora"].task.options == {"adapter_path": "adapters-3"}
    assert "Its own adapters go to adapters-3." in capsys.readouterr().out


def test_init_keeps_adapters_of_a_run_whose_state_is_elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "adapters").mkdir()
    (project / "adapters/adapters.safetensors").write_text("finished")
    assert read_settings(written("one.toml")).runs["lora"].task.options == {"adapter_path": "adapters-2"}
    (project / "named").mkdir()
    (project / "named/adapters.safetensors").write_text("finished")
    with Path("lora.yaml").open("a") as file:
        file.write('\nadapter_path: "named"  # mine\n')
    (project / "sub").mkdir()
    monkeypatch.chdir(project / "sub")
    assert write_settings(RunRequest(Path("../lora.yaml")), Path("two.toml")) == 0
    found = read_settings(Path("two.toml")).runs["lora"].task.options["adapter_path"]
    assert (Path(found).name, Path(found).exists()) == ("named-2", False)


def written(name: str) -> Path:
    assert write_settings(RunRequest(Path("lora.yaml")), Path(name)) == 0
    return Path(name)


def test_every_line_that_is_off_in_a_written_file_is_valid(project: Path) -> None:
    text = settings_text(RunRequest(Path("lora.yaml")), Path("settings.toml"))
    lines = [line.removeprefix("# ") if " = " in line else line for line in text.splitlines()]
    path = project / "all.toml"
    path.write_text("\n".join(lines))
    run = read_settings(path).runs["lora"]
    assert (run.steps, run.batch.size, run.task.options) == (1000, 4, {"iters": 200})


def test_the_skeleton_names_both_kinds_and_reads_once_the_file_exists(project: Path) -> None:
    text = settings_text(RunRequest(), Path("settings.toml"))
    assert 'entry = "my_task:build"' in text
    assert tomllib.loads(text)["runs"]["run"]["task"] == {"kind": "mlx_lm", "config": "lora.yaml"}
    (project / "settings.toml").write_text(text)
    assert list(read_settings(project / "settings.toml").runs) == ["run"]


def test_init_keeps_a_file_that_exists(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "settings.toml"
    path.write_text("mine")
    assert write_settings(RunRequest(Path("lora.yaml")), path) == 2
    assert (path.read_text(), "the file exists and is kept" in capsys.readouterr().err) == ("mine", True)
    assert write_settings(RunRequest(path), Path("other.toml")) == 2
    assert "settings.toml: allowed: a configuration file of mlx_lm.lora" in capsys.readouterr().err


def test_init_makes_the_folder_of_its_file(project: Path) -> None:
    assert write_settings(RunRequest(Path("lora.yaml")), Path("cfg/new/s.toml")) == 0
    assert list(read_settings(project / "cfg" / "new" / "s.toml").runs)


def test_serve_without_a_file_says_how_to_get_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    command = [sys.executable, "-m", "mlx_supervisor", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "settings.toml: no such file" in done.stderr
    assert "serve -c FILE" in done.stderr
    assert "mlx-supervisor init -o ~/.config/mlx-supervisor/settings.toml" in done.stderr
    other = subprocess.run([*command, "-c", "x.toml"], capture_output=True, text=True, check=False)
    assert (other.returncode, "init" in other.stderr) == (2, False)


def test_every_option_has_a_line_of_help() -> None:
    assert all(one.help.endswith(".") and len(one.help) < 100 for one in MLX_LM)
