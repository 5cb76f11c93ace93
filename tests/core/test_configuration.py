"""A run without a settings file: from mlx_lm's configuration file, from its options, or from both."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.settings.configuration import valid_name
from mlx_supervisor.settings.reader import read_settings, settings_without_file
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.settings.to_job import job_of
from mlx_supervisor.wire import Job

MLX_LM = '[runs.{0}]\n[runs.{0}.task]\nkind = "mlx_lm"\nconfig = "{1}"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two configuration files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_SUPERVISOR_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "lora.yaml").write_text("iters: 5\n")
    (tmp_path / "configs" / "my lora.yml").write_text("iters: 5\n")
    return tmp_path


def job(path: Path, **options: object) -> Job:
    settings = settings_without_file(path, options, None)
    return job_of(settings, next(iter(settings.runs)), Path("/run"), None, Spawn(1, None, None), None)


def test_a_configuration_file_is_a_run_with_defaults(project: Path) -> None:
    settings = read_settings(Path("lora.yaml"))
    assert (settings.path, list(settings.runs)) == (project / "lora.yaml", ["lora"])
    task = job(Path("lora.yaml")).task
    assert (task.kind, task.config, task.options) == ("mlx_lm", str(project / "lora.yaml"), {})


def test_paths_in_it_start_at_the_current_folder_as_for_mlx_lm(project: Path) -> None:
    settings = read_settings(project / "configs" / "my lora.yml")
    assert list(settings.runs) == ["my-lora"]
    assert job(project / "configs" / "my lora.yml").task.base_dir == str(project)


def test_its_seed_is_the_runs_until_settings_name_one(project: Path) -> None:
    assert job(Path("lora.yaml")).seed_from_task
    text = MLX_LM.format("a", "lora.yaml")
    for settings, expected in ((text, (0, True)), (text.replace("[runs.a]\n", "[runs.a]\nseed = 0\n"), (0, False))):
        path = project / "settings.toml"
        path.write_text(settings)
        found = job_of(read_settings(path), "a", Path("/run"), None, Spawn(1, None, None), None)
        assert (found.seed, found.seed_from_task) == expected


def test_another_adapter_folder_is_another_run(project: Path) -> None:
    def name(**options: str) -> str:
        return next(iter(settings_without_file(Path("lora.yaml"), options, None).runs))

    assert name() == name(model="m") == "lora"
    assert name(adapter_path=str(project / "out" / "b")) == "lora-out-b"
    assert name(adapter_path="/data/b") == "lora-data-b"
    assert next(iter(settings_without_file(None, {"model": "m"}, None).runs)) == "run"


def test_options_alone_are_a_run_of_the_current_folder(project: Path) -> None:
    settings = settings_without_file(None, {"model": "m", "iters": 3}, "trial")
    task = job_of(settings, "trial", Path("/run"), None, Spawn(1, None, None), None).task
    assert (settings.path.parent, task.config, task.base_dir) == (project, None, str(project))
    assert (task.options, task.options_from) == ({"model": "m", "iters": 3}, {"model": "--model", "iters": "--iters"})


def test_options_of_a_settings_file_are_named_by_their_key(project: Path) -> None:
    path = project / "settings.toml"
    path.write_text(MLX_LM.format("a", "lora.yaml") + "options = { batch_size = 2 }\n")
    task = job_of(read_settings(path), "a", Path("/run"), None, Spawn(1, None, None), None).task
    assert task.options_from == {"batch_size": f"{path}: runs.a.task.options.batch_size"}


@pytest.mark.parametrize(
    ("text", "name"),
    [("lora", "lora"), ("my lora (2)", "my-lora-2"), ("..", "run"), ("All", "run"), ("_x", "x"), ("日本", "run")],
)
def test_any_file_name_becomes_a_valid_name(text: str, name: str) -> None:
    assert valid_name(text) == name


def test_long_names_stay_different() -> None:
    first, second = valid_name("a" * 80 + "1"), valid_name("a" * 80 + "2")
    assert len(first) == len(second) == 64
    assert first != second


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "none.yaml", "none.yaml: no such file"),
        (lambda folder: folder / "configs", "configs: this is a folder"),
        (lambda folder: (folder / "x.yaml").write_bytes(b"a: \xff") and folder / "x.yaml", "x.yaml: line 1: byte 0xff"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(project: Path, make: Callable[[Path], Path], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        read_settings(make(project))


@pytest.mark.parametrize(
    ("second", "refused"),
    [
        (MLX_LM.format("b", "lora.yaml"), "runs.b.task.config: found the same as runs.a"),
        (MLX_LM.format("b", "./configs/../lora.yaml"), "runs.b.task.config: found the same as runs.a"),
        (MLX_LM.format("b", "lora.yaml") + 'options = { adapter_path = "b" }\n', None),
        (MLX_LM.format("b", "configs/my lora.yml"), None),
    ],
)
def test_two_runs_of_one_file_need_different_adapter_folders(project: Path, second: str, refused: str | None) -> None:
    path = project / "settings.toml"
    path.write_text(MLX_LM.format("a", "lora.yaml") + second)
    if refused is None:
        assert len(read_settings(path).runs) == 2
    else:
        with pytest.raises(SettingsError, match=refused):
            read_settings(path)


def test_two_runs_with_one_adapter_option_are_refused(project: Path) -> None:
    path = project / "settings.toml"
    option = 'options = { adapter_path = "out" }\n'
    path.write_text(MLX_LM.format("a", "lora.yaml") + option + MLX_LM.format("b", "configs/my lora.yml") + option)
    with pytest.raises(SettingsError, match=r"runs\.b\.task\.options\.adapter_path: found the same as runs\.a"):
        read_settings(path)


def test_options_of_mlx_lm_are_only_for_its_tasks(project: Path) -> None:
    path = project / "settings.toml"
    task = 'kind = "python"\nentry = "a:b"\noptions = { iters = 2 }\n'
    path.write_text(f"[runs.a]\nsteps = 1\n[runs.a.task]\n{task}")
    with pytest.raises(SettingsError, match=r"runs\.a\.task\.options: .* for kind \"mlx_lm\""):
        read_settings(path)
