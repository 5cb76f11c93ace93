"""Which state folders and runs a command means."""

import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mlx_supervisor.settings.configuration import is_configuration, names_run
from mlx_supervisor.settings.default_state_dir import default_state_dir
from mlx_supervisor.settings.paths import DEFAULT_FILE, resolve
from mlx_supervisor.settings.reader import STATE_DIR_VARIABLE, read_settings
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.state_dir import COMMAND_LINE, PROJECTS

PREFERRED = "settings.toml"


class UsageError(Exception):
    """What was given doesn't name a run; the text says what to give."""


@dataclass(frozen=True)
class Place:
    """A state folder. `settings`: the file that led to it; None without one. `configured`: the names in that file."""

    path: Path
    settings: Path | None = None
    configured: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """For a person: the folder, and the file that led to it."""
        return f"{self.path}" if self.settings is None else f"{self.path} (settings: {self.settings})"

    def run_dir(self, name: str) -> Path:
        """The run's folder."""
        return self.path / "runs" / name


@dataclass(frozen=True)
class Given:
    """The state folders that a command line means, and the run names in it, in the given order.

    `everywhere`: neither the command line nor the current folder chose them: all of the user's.
    """

    places: list[Place]
    names: list[str]
    everywhere: bool = False


def find(words: Sequence[str], state_dir: Path | None) -> Given:
    """Settings files and state folders among `words` say where to read; the other words are names of runs.

    Without any, and without `state_dir`: the settings files in the current folder; else that of the daemon, and all of
    the user's state folders. Raises SettingsError.
    """
    files = [word for word in words if _is_place(word)]
    names = [word for word in words if word not in files]
    places = [place_of(Path(word), state_dir) for word in files]
    if state_dir is not None and not places:
        places = [Place(state_dir.expanduser().resolve())]
    here = places or _in_current_folder()
    return Given(here or _of_user(), names, everywhere=not here and not os.environ.get(STATE_DIR_VARIABLE))


def place_of(path: Path, state_dir: Path | None = None) -> Place:
    """The state folder of a settings file, or the folder itself. Raises SettingsError."""
    if path.is_dir():
        return Place(path.expanduser().resolve())
    try:
        settings = read_settings(path, state_dir)
    except SettingsError as error:
        folder = state_dir or _named_in(path)
        if folder is None or not is_state_dir(folder):
            raise
        print(f"{error}\nShowing what is in {folder}.", file=sys.stderr)
        return Place(folder.resolve(), path.absolute())
    # without a settings file, an option of `run` may have named the run otherwise
    names = () if is_configuration(path) else tuple(settings.runs)
    return Place(settings.state_dir.resolve(), settings.path, names)


def _named_in(path: Path) -> Path | None:
    """The state folder of a settings file that is wrong otherwise; None if it cannot be read."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8")).get("state_dir")
    except (OSError, ValueError):
        return None
    return resolve(value, path.absolute().parent) if isinstance(value, str) else default_state_dir(path)


def is_state_dir(path: Path) -> bool:
    """Whether the folder has a supervisor's files."""
    return (path / "journal.db").exists() or (path / "runs").is_dir()


def _is_place(word: str) -> bool:
    path = Path(word).expanduser()
    return names_run(path) or (path.is_dir() and (is_state_dir(path) or os.sep in word))


def _of_user() -> list[Place]:
    variable = os.environ.get(STATE_DIR_VARIABLE)
    if variable:
        return [Place(Path(variable).expanduser().absolute())]
    base = platformdirs.user_state_path("mlx-supervisor")
    default = DEFAULT_FILE.expanduser()
    places = [place_of(default)] if default.is_file() else []
    known = {place.path for place in places}
    folders = [base, *sorted((base / PROJECTS).glob("*"))]
    places += [Place(folder) for folder in folders if folder not in known and is_state_dir(folder)]
    return places or [Place(base)]


def _in_current_folder() -> list[Place]:
    """Of every settings file here that has a state folder, and of runs without one; else of `settings.toml`."""
    here = Path.cwd()
    found: dict[Path, Place] = {}
    for path in sorted(here.iterdir()):
        if path.is_file() and names_run(path):
            try:
                place = place_of(path)
            except SettingsError:
                continue  # another program's file
            if is_state_dir(place.path):
                found.setdefault(place.path, place)
    typed = Place(default_state_dir(here / COMMAND_LINE).resolve())
    if is_state_dir(typed.path):
        found.setdefault(typed.path, typed)
    if not found and (here / PREFERRED).is_file():
        return [place_of(here / PREFERRED)]
    return list(found.values())
