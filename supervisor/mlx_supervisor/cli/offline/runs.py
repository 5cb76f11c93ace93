"""What is known of a run without its supervisor: from the journal, else from `summary.json`."""

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlx_supervisor.cli.offline.places import Place, UsageError
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.reader import JournaledGeneration, JournalReader, Record
from mlx_supervisor.process.orphans import is_running

PREVIOUS = re.compile(r"\.previous(\.[2-9])?$")
"""The end of the name of a folder that --fresh set aside."""

NAMES_SHOWN, PLACES_SHOWN = 12, 3
"""Of the runs and state folders in an error."""


@dataclass(frozen=True)
class KnownRun:
    """A run of a state folder, as it was when it was read.

    `history`: None without a readable journal; `ready`: the newest notice that a worker was ready; `summary`: None
    before the first end; `worker`: the generation that is running, if any.
    """

    place: Place
    name: str
    journal: JournalReader | None
    history: RunHistory | None
    generations: list[JournaledGeneration]
    ready: Record | None
    summary: Record | None
    supervised: bool
    worker: JournaledGeneration | None

    @property
    def folder(self) -> Path:
        return self.place.run_dir(self.name)

    @property
    def state(self) -> str:
        """One of: running, starting, waiting, interrupted, completed, failed, stopped, not started."""
        worker, past = self.worker, self.history
        if worker is not None:
            ready = self.ready is not None and self.ready["generation"] == worker.generation
            return "running" if ready else "starting"
        if past is None:
            return str((self.summary or {}).get("outcome") or "not started")
        unended = bool(self.generations) and self.generations[-1].record is None
        if past.unfinished or unended:
            return "waiting" if self.supervised else "interrupted"
        return past.outcome or "not started"


def all_of(place: Place) -> list[KnownRun]:
    """The runs of a state folder: the settings' first, then the journal's, then those that only have a folder."""
    journal = open_journal(place)
    names = list(place.configured)
    if journal is not None:
        with suppress(JournalError):  # reported when a run is read
            names += journal.runs()
    with suppress(OSError):
        names += sorted(path.name for path in (place.path / "runs").iterdir() if path.is_dir())
    supervised = is_supervised(place.path)
    return [_read(place, name, journal, supervised) for name in dict.fromkeys(names)]


def chosen(places: Sequence[Place], names: Sequence[str], *, whole: bool = False) -> list[KnownRun]:
    """The runs of these names; without names, all that were started (`whole`: all of the settings, too).

    Raises UsageError that lists the runs there are.
    """
    found = [run for place in places for run in all_of(place)]
    if names:
        missing = [name for name in names if name not in {run.name for run in found}]
        if missing:
            raise UsageError(f"no run {missing[0]!r} in {_listed(places)}; {_there(found)}")
        return [run for name in names for run in found if run.name == name]
    return [
        run for run in found if not PREVIOUS.search(run.name) and (whole or run.state != "not started" or run.summary)
    ]


def one(places: Sequence[Place], names: Sequence[str]) -> KnownRun:
    """The one run that is meant. Raises UsageError."""
    if len(names) > 1:
        raise UsageError(f"one run at a time: found {', '.join(names)}")
    found = chosen(places, names) or chosen(places, names, whole=True)
    if not found:
        raise UsageError(f"no run yet in {_listed(places)}")
    if len(found) > 1:
        where = "; ".join(f"{run.name} in {run.place.path}" for run in found)
        raise UsageError(f"several runs: {where}; name one (and its settings file, or --state-dir)")
    return found[0]


def open_journal(place: Place) -> JournalReader | None:
    """The journal; None if it is missing or unreadable, which is said on stderr if it matters."""
    path = place.path / "journal.db"
    if not path.exists():
        if (place.path / "runs").is_dir():
            print(
                f"{path} is missing: only checkpoints, logs and summaries of finished runs are known", file=sys.stderr
            )
        return None
    try:
        return JournalReader(path)
    except JournalError as error:
        print(f"{error}; showing what the summaries of finished runs say", file=sys.stderr)
        return None


def is_supervised(state_dir: Path) -> bool:
    """Whether a supervisor holds the folder. Taking its lock would bar a supervisor that starts now, so its pid is
    read: that of a process that is older than the lock file's last write."""
    lock = state_dir / "supervisor.lock"
    try:
        process = psutil.Process(int(lock.read_text()))
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= lock.stat().st_mtime + 1.0
    except (OSError, ValueError, psutil.Error):
        return False


def read_summary(folder: Path) -> dict[str, Any] | None:
    """`summary.json` of a run's folder; None without a readable one."""
    try:
        found = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _read(place: Place, name: str, journal: JournalReader | None, supervised: bool) -> KnownRun:
    history, generations, ready = None, [], None
    if journal is not None:
        try:
            generations = journal.generations(name)
            ready = journal.last_notice(name, "ready")
            snapshot = journal.history(name)
            history = None if snapshot is None else RunHistory.restore(snapshot)
        except (JournalError, ValueError) as error:
            print(f"{name}: {error}; showing what summary.json says", file=sys.stderr)
    if history is not None and ready is not None and not history.target_steps:  # saved before the worker was ready
        history.target_steps = int(ready["fields"].get("target_steps") or 0)
    unended = (each for each in reversed(generations) if each.record is None and each.pid)
    worker = next((each for each in unended if is_running(each.pid, each.create_time_s)), None)
    summary = read_summary(place.run_dir(name))
    return KnownRun(place, name, journal, history, generations, ready, summary, supervised, worker)


def _listed(places: Sequence[Place]) -> str:
    more = f" and {len(places) - PLACES_SHOWN} more state folders" if len(places) > PLACES_SHOWN else ""
    return ", ".join(os.fspath(place.path) for place in places[:PLACES_SHOWN]) + more


def _there(runs: Sequence[KnownRun]) -> str:
    names = dict.fromkeys(run.name for run in runs)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"there are: {', '.join([*names][:NAMES_SHOWN])}{more}" if names else "no run was started there"
