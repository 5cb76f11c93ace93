"""A run as the command line names it: FILE and NAME, and options over them, or options alone."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from mlx_supervisor.host.memory import machine_bytes
from mlx_supervisor.settings.configuration import is_configuration, names_run, option
from mlx_supervisor.settings.reader import read_settings, settings_without_file
from mlx_supervisor.settings.schema import RunSettings, Settings, SettingsError
from mlx_supervisor.settings.sizes import parse_limit
from mlx_supervisor.settings.to_policy import limit_bytes

SHOWN = 3
_PATHS = frozenset({"adapter_path", "resume_adapter_file"})
_PATHS_OR_NAMES = frozenset({"model", "data"})
"""A folder, or a name on the hub."""
_OVERRULED = {
    "iters": "steps", "seed": "seed", "batch_size": "batch.size", "grad_accumulation_steps": "batch.size",
}  # fmt: skip
"""Options that a key of the settings overrides: with both, the option would be ignored."""


@dataclass(frozen=True)
class RunRequest:
    """`options`: those of mlx_lm.lora as typed, by key (`batch_size`). `memory_limit`: as typed, over the settings'."""

    file: Path | None = None
    name: str | None = None
    state_dir: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    memory_limit: str | None = None
    mlx_lm_compatible: bool = False

    def read(self) -> tuple[Settings, str]:
        """The settings, and the run's name in them. Raises SettingsError."""
        options = {key: _absolute(key, value) for key, value in self.options.items()}
        if self.file is None or is_configuration(self.file):
            self._require_source()
            settings = settings_without_file(self.file, options, self.name, self.state_dir)
            name = next(iter(settings.runs))
        else:
            settings = read_settings(self.file, self.state_dir)
            name = choose(settings, self.name)
            settings = _with_options(settings, name, options)
        settings = self._with_accumulation(self._with_limit(settings, name), name)
        self._check_limit(settings, name)
        return settings, name

    def command(self) -> str:
        """The command line for this run, quoted for a shell."""
        words = ["mlx-supervisor", "run", *([] if self.file is None else [str(self.file)])]
        if self.name is not None:
            words += [self.name] if self.file is not None else ["--name", self.name]
        for key, value in self.options.items():
            words += [option(key)] if value is True else [option(key), str(value)]
        for key, given in (("memory_limit", self.memory_limit), ("state_dir", self.state_dir)):
            words += [] if given is None else [option(key), str(given)]
        words += [option("mlx_lm_compatible")] * self.mlx_lm_compatible
        return shlex.join(words)

    def _require_source(self) -> None:
        """A run without a file needs a model and data; a file must exist."""
        if self.file is None:
            if not self.options:
                raise SettingsError([what_to_type()])
            if missing := [option(key) for key in ("model", "data") if key not in self.options]:
                text = f"{' and '.join(missing)}: found nothing; without a configuration file, both are required"
                raise SettingsError([f"{text} (or name the file: mlx-supervisor run lora.yaml)"])

    def _with_limit(self, settings: Settings, name: str) -> Settings:
        if self.memory_limit is None:
            return settings
        run, text = settings.runs[name], self.memory_limit
        try:
            limit = parse_limit(_number(text))
        except ValueError as error:
            raise SettingsError([f'--memory-limit: found "{text}"; allowed: {error}']) from None
        memory = msgspec.structs.replace(run.memory, limit=limit)
        return _replaced(settings, name, msgspec.structs.replace(run, memory=memory))

    def _check_limit(self, settings: Settings, name: str) -> None:
        """This machine has the memory of the limit."""
        key = f"runs.{name}"
        try:
            limit_bytes(settings.runs[name], machine_bytes(), key)
        except SettingsError as error:
            if self.memory_limit is None:
                raise SettingsError(error.problems, settings.path) from None
            problems = [each.replace(f"{key}.memory.limit", "--memory-limit") for each in error.problems]
            raise SettingsError(problems) from None

    def _with_accumulation(self, settings: Settings, name: str) -> Settings:
        run = settings.runs[name]
        if not self.mlx_lm_compatible:
            return settings
        if run.task.kind != "mlx_lm":
            text = f'only for kind "mlx_lm"; runs.{name} has kind "{run.task.kind}"'
            raise SettingsError([f"--mlx-lm-compatible: found with a run of another kind; allowed: {text}"])
        task = msgspec.structs.replace(run.task, mlx_lm_compatible=True)
        return _replaced(settings, name, msgspec.structs.replace(run, task=task))


def choose(settings: Settings, name: str | None) -> str:
    """The run to use. Raises SettingsError when there is no such run, or several and no name is given."""
    names = list(settings.runs)
    if name is None and len(names) == 1:
        return names[0]
    if name in settings.runs:
        return str(name)
    found = "no name given" if name is None else f"no run {name!r}"
    raise SettingsError([f"runs: {found}; allowed: {', '.join(names)}"], settings.path)


def what_to_type() -> str:
    """Help for a command line that names no run."""
    found = sorted(path.name for path in Path.cwd().glob("*") if names_run(path))
    found = [name for name in found if name != "pyproject.toml"]
    here = f"\nIn this folder: {', '.join(found[:SHOWN])}{', …' if len(found) > SHOWN else ''}" if found else ""
    return (
        "What should it train? Type one of\n"
        "  mlx-supervisor run lora.yaml                    a configuration file of mlx_lm.lora\n"
        "  mlx-supervisor run --model MODEL --data FOLDER  the options of mlx_lm.lora alone\n"
        "  mlx-supervisor run settings.toml                a settings file (`mlx-supervisor init` writes one)\n"
        f"All options: mlx-supervisor run --help{here}"
    )


def _absolute(key: str, value: Any) -> Any:
    """A path typed on the command line starts at the current folder; a name on the hub stays as it is."""
    if key not in _PATHS | _PATHS_OR_NAMES:
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # no home folder
        return value
    is_path = key in _PATHS or path.exists() or str(value).startswith((".", "/", "~"))
    return str(Path(path).absolute()) if is_path else value


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_options(settings: Settings, name: str, options: dict[str, Any]) -> Settings:
    """The settings with the options of the command line over those of the run."""
    run, problems = settings.runs[name], []
    for key in options:
        if run.task.kind != "mlx_lm":
            allowed = f'only for kind "mlx_lm"; runs.{name} has kind "{run.task.kind}"'
            problems.append(f"{option(key)}: found an option of mlx_lm.lora; allowed: {allowed}")
        elif key in _OVERRULED and (value := _at(run, _OVERRULED[key])) is not None:
            problems.append(f"{option(key)}: runs.{name}.{_OVERRULED[key]} = {value} overrides it; change that key")
    if problems:
        raise SettingsError(problems, settings.path)
    task = msgspec.structs.replace(run.task, options=run.task.options | options)
    changed = _replaced(settings, name, msgspec.structs.replace(run, task=task))
    return replace(changed, typed=frozenset(options))


def _at(run: RunSettings, dotted: str) -> object:
    value: object = run
    for step in dotted.split("."):
        value = getattr(value, step)
    return value


def _replaced(settings: Settings, name: str, run: RunSettings) -> Settings:
    return replace(settings, runs=settings.runs | {name: run})
