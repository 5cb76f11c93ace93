"""Reading the journal without a supervisor, also while one writes it. Nothing is created, repaired or locked."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_supervisor.journal.database import BUSY_TIMEOUT_S, SCHEMA_VERSION, JournalError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JournaledGeneration:
    """A generation as journaled. `record`: its part of the summary; None while no end is recorded."""

    generation: int
    pid: int
    create_time_s: float
    opened_s: float
    record: Record | None


class JournalReader:
    """The journal at `path`, read-only. Every method raises JournalError, also the constructor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise JournalError(f"{path}: no such file")
        version = self._select("PRAGMA user_version")[0]["user_version"]
        if not 0 < version <= SCHEMA_VERSION:
            what = "a newer mlx-supervisor wrote it" if version else "not a journal of mlx-supervisor"
            raise JournalError(f"{path}: {what} (schema version {version}; allowed: 1 to {SCHEMA_VERSION})")

    def runs(self) -> list[str]:
        """Names of all runs, by the time of their last use."""
        return [row["run"] for row in self._select("SELECT run FROM runs ORDER BY used_s")]

    def history(self, run: str) -> Record | None:
        """The run's history as last saved; None without one."""
        rows = self._select("SELECT history FROM runs WHERE run = ?", run)
        return _object(rows[0]["history"]) if rows else None

    def generations(self, run: str) -> list[JournaledGeneration]:
        """All generations of the run, in order."""
        rows = self._select("SELECT * FROM generations WHERE run = ? ORDER BY generation", run)
        return [
            JournaledGeneration(
                row["generation"], row["pid"], row["create_time_s"], row["opened_s"], _object(row["record"])
            )
            for row in rows
        ]

    def step_totals(self, run: str) -> dict[int, Record]:
        """For every generation with steps: `steps`, `tokens`, `samples`, `first_step`, `first_wall_s`, `last_wall_s`
        and, of its last step, `step`, `loss`, `batch_size`, `accumulation`. `later_tokens`: without the first step's.
        """
        totals = (
            "SELECT s.generation, count(*) AS steps, sum(s.tokens) AS tokens, sum(s.samples) AS samples,"
            " min(s.wall_s) AS first_wall_s, max(s.wall_s) AS last_wall_s, min(s.id) AS first, max(s.id) AS last"
            " FROM steps s WHERE s.run = ? GROUP BY s.generation"
        )
        found = {}
        for row in self._select(totals, run):
            first, last = (self._select("SELECT * FROM steps WHERE id = ?", row[end])[0] for end in ("first", "last"))
            ends = {key: last[key] for key in ("step", "loss", "batch_size", "accumulation")}
            later = {"first_step": first["step"], "later_tokens": (row["tokens"] or 0) - (first["tokens"] or 0)}
            found[row["generation"]] = row | ends | later
        return found

    def losses(self, run: str) -> dict[int, float | None]:
        """The loss of every journaled step, as last reported; None: not a number."""
        return {
            row["step"]: row["loss"]
            for row in self._select("SELECT step, loss FROM steps WHERE run = ? ORDER BY id", run)
        }

    def last_steps(self, run: str, count: int) -> list[Record]:
        """The newest step reports, oldest first."""
        rows = self._select("SELECT * FROM steps WHERE run = ? ORDER BY id DESC LIMIT ?", run, count)
        return rows[::-1]

    def last_sample(self, run: str) -> Record | None:
        """The newest memory sample."""
        rows = self._select("SELECT * FROM samples WHERE run = ? ORDER BY id DESC LIMIT 1", run)
        return rows[0] if rows else None

    def last_notice(self, run: str, kind: str = "%") -> Record | None:
        """The newest notice (of a kind): `generation`, `kind`, `level`, `text`, `fields`, `wall_s`."""
        sql = "SELECT * FROM events WHERE run = ? AND kind LIKE ? ORDER BY id DESC LIMIT 1"
        rows = self._select(sql, run, kind)
        return rows[0] | {"fields": _object(rows[0]["fields"]) or {}} if rows else None

    def validations(self, run: str) -> dict[int, float | None]:
        """The validation loss by step, as last reported; None: not a number."""
        sql = "SELECT fields FROM events WHERE run = ? AND kind = 'validation' ORDER BY id"
        found = (_object(row["fields"]) or {} for row in self._select(sql, run))
        return {fields["step"]: fields.get("loss") for fields in found if "step" in fields}

    def peaks(self, run: str) -> dict[int, int]:
        """The largest sampled footprint of every generation, in bytes."""
        sql = (
            "SELECT generation, max(footprint_bytes) AS peak FROM ("
            "SELECT run, generation, footprint_bytes FROM samples UNION ALL "
            "SELECT run, generation, footprint_bytes FROM steps) WHERE run = ? GROUP BY generation"
        )
        return {row["generation"]: row["peak"] for row in self._select(sql, run)}

    def tripped(self, run: str) -> set[int]:
        """The generations with a notice of a memory trip. A soft trip and the hard one after it are one trip."""
        rows = self._select("SELECT DISTINCT generation FROM events WHERE run = ? AND kind = 'trip'", run)
        return {row["generation"] for row in rows}

    def _select(self, sql: str, *parameters: object) -> list[dict[str, Any]]:
        try:
            with closing(_connect(self.path)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(sql, parameters)]
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: cannot be read: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    name = f"file:{quote(str(path))}?mode=ro"
    connection = sqlite3.connect(name, uri=True, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        connection.close()
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise
        # a folder that this user may not write: SQLite's side files cannot be made, and no supervisor uses them now
        connection = sqlite3.connect(f"{name}&immutable=1", uri=True)
    return connection


def _object(text: str | None) -> Record | None:
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
