"""Whose run it is: a run belongs to the settings file that first started it."""

from pathlib import Path

from mlx_supervisor.core import actions as act
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.settings.schema import Settings, SettingsError
from mlx_supervisor.state_dir import StateDir, is_present, left_behind, owner_of, record_owner


def claim(history: RunHistory, name: str, settings: Settings, state: StateDir) -> None:
    """Record the settings file in the run's history and folder.

    Raises SettingsError if either is another file's, and StateDirError.
    """
    file, folder = str(settings.path.resolve()), state.run_dir(name)
    of_journal = history.settings_file if history.generation > 0 else ""
    recorded = next((each for each in (of_journal, owner_of(folder)) if each not in ("", file)), None)
    if recorded is not None:
        moved, restore = (
            ("", "") if is_present(Path(recorded)) else (", which no longer exists", ", move the file back")
        )
        text = (
            f"runs.{name}: the state folder {state.path} already holds a run named {name!r} of {recorded}"
            f"{moved}; this is {file}. Rename this run, choose another --state-dir{restore}, "
            f"or set that run aside with --fresh."
        )
        raise SettingsError([text])
    record_owner(folder, name, file)
    history.settings_file = file


def notice_without_history(name: str, settings: Settings, state: StateDir) -> act.Notice | None:
    """What a run without a history should know: checkpoints without a journal, or a moved settings file."""
    folder = state.run_dir(name)
    if any((folder / "checkpoints").glob("step-*")):
        text = f"The journal has no history of this run; it resumes from the checkpoints in {folder}."
        return act.Notice("history_lost", text, act.Severity.WARNING)
    moved = left_behind(state.path, name, settings.path.resolve())
    if moved is None:
        return None
    text = (
        f"This run is new. Another one named {name!r} is in {moved[1]}; its settings file {moved[0]} "
        f"no longer exists. If you moved it, move it back to resume that run."
    )
    return act.Notice("moved", text, act.Severity.WARNING)
