"""The TOML file as frozen, validated types; mlx_lm's configuration file as a run with default settings."""

import contextlib
import difflib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_supervisor.settings import validation
from mlx_supervisor.settings.configuration import SETTINGS_SUFFIX, is_configuration, name_of, names_run, run_of
from mlx_supervisor.settings.default_state_dir import default_state_dir
from mlx_supervisor.settings.paths import resolve
from mlx_supervisor.settings.rules import check_name, check_outputs, check_run
from mlx_supervisor.settings.schema import RunSettings, Settings, SettingsError
from mlx_supervisor.state_dir import COMMAND_LINE

FILE_LIMIT_BYTES = 1024 * 1024
RUNS_LIMIT = 64
STATE_DIR_VARIABLE = "MLX_SUPERVISOR_STATE_DIR"


def read_settings(path: Path, state_dir: Path | None = None) -> Settings:
    """The settings in a TOML file, or those of one run with defaults for mlx_lm's configuration file (YAML).

    The state folder is `state_dir`, else the file's key `state_dir`, else the environment's MLX_SUPERVISOR_STATE_DIR,
    else the file's own in the user's state folder (`default_state_dir`). Raises SettingsError with every problem found.
    """
    path = path.expanduser().absolute()
    if is_configuration(path):
        return settings_without_file(path, {}, None, state_dir)
    document = _parse(path, _read(path))
    problems = validation.Problems()
    base = path.parent
    for key, value in document.items():
        if key not in ("runs", "state_dir"):
            hint = f"did you mean [{validation.join('runs', key)}]?" if isinstance(value, dict) else ""
            problems.add(validation.join("", key), "an unknown key", "runs, state_dir", hint)
    runs = _read_runs(document.get("runs"), base, problems)
    check_outputs(runs, base, problems)
    folder = _state_dir(document.get("state_dir"), path, state_dir, problems)
    if problems.count:
        raise SettingsError(problems.listed(), path)
    return Settings(path=path, state_dir=folder, runs=runs)


def settings_without_file(
    configuration: Path | None, options: Mapping[str, Any], name: str | None, state_dir: Path | None = None
) -> Settings:
    """One run with default settings: of mlx_lm's configuration file, of options typed, or of both.

    Relative paths start at the current folder, as for mlx_lm. Raises SettingsError with every problem found.
    """
    base = Path.cwd()
    path = base / COMMAND_LINE
    if configuration is not None:
        path = configuration = configuration.expanduser().absolute()
        _read(path)
    problems = validation.Problems()
    chosen = name or name_of(configuration, options, base)
    run = run_of(configuration, options)
    check_name(chosen, "NAME", {}, problems)
    check_run(run, "", base, problems)
    folder = _state_dir(None, path, state_dir, problems)
    if problems.count:
        raise SettingsError(problems.listed(), configuration)
    return Settings(path, folder, {chosen: run}, base, frozenset(options))


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise SettingsError([f"this is {what}"], path)
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError([f"no such file{_nearest(path)}"], path) from None
    except (OSError, ValueError) as error:
        raise SettingsError([f"cannot be read: {error}"], path) from None
    if len(data) > FILE_LIMIT_BYTES:
        raise SettingsError([f"larger than {FILE_LIMIT_BYTES:,} bytes"], path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        text = f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8"
        raise SettingsError([text], path) from None


def _nearest(path: Path) -> str:
    """The file beside a missing one that was probably meant."""
    with contextlib.suppress(OSError):
        names = [each.name for each in path.parent.iterdir() if names_run(each)]
        near = difflib.get_close_matches(path.name, names, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    return ""


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: 5,000 digits, deep nesting
        raise SettingsError([f"invalid TOML: {error!s:.200}{_looks_like_yaml(path, text)}"], path) from None


def _looks_like_yaml(path: Path, text: str) -> str:
    """A hint for a configuration file of mlx_lm.lora under another name."""
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    if path.suffix == SETTINGS_SUFFIX and not re.match(r"\s*([\w-]+:\s|\{|---)", first):
        return ""
    return "; a settings file is TOML, and the name of a configuration file of mlx_lm.lora must end in .yaml or .yml"


def _read_runs(table: object, base: Path, problems: validation.Problems) -> dict[str, RunSettings]:
    if table is None or table == {}:
        problems.add("runs", "no run", "at least one table [runs.NAME]")
        return {}
    if not validation.is_table(table):
        problems.add("runs", validation.show(table), "tables [runs.NAME]")
        return {}
    if len(table) > RUNS_LIMIT:
        problems.add("runs", f"{len(table)} runs", f"at most {RUNS_LIMIT}")
        return {}
    runs: dict[str, RunSettings] = {}
    folded: dict[str, str] = {}
    for name, run_table in table.items():
        path = validation.join("runs", name)
        check_name(name, path, folded, problems)
        run = validation.convert(run_table, RunSettings, path, problems)
        if run is not None:
            check_run(run, path, base, problems)
            runs[name] = run
    return runs


def _state_dir(value: object, file: Path, argument: Path | None, problems: validation.Problems) -> Path:
    chosen: Path | None = None
    if value is not None:
        if isinstance(value, str) and value and value.isprintable():
            chosen = resolve(value, file.parent)
        if chosen is None:
            problems.add("state_dir", validation.show(value), "the path of a folder")
    if argument is not None:
        return argument.expanduser().absolute()
    from_environment = os.environ.get(STATE_DIR_VARIABLE)
    if chosen is None and from_environment:
        chosen = resolve(from_environment, Path.cwd())
        if chosen is None:
            problems.add(f"${STATE_DIR_VARIABLE}", validation.show(from_environment), "the path of a folder")
    return chosen or default_state_dir(file)
