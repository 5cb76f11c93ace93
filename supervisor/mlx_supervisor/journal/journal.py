"""The runs' records in SQLite, which survive the supervisor.

One thread writes. Notices, steps and samples are queued and committed about once a second; the queue is bounded and
the caller never waits: rows that don't fit are dropped and counted. Histories and generations are durable on return.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.journal import database
from mlx_supervisor.journal.database import JournalError as JournalError
from mlx_supervisor.journal.tables import row_of
from mlx_supervisor.journal.transactions import Retention
from mlx_supervisor.journal.unsaved import end_of, history_of
from mlx_supervisor.journal.writer import QUEUE_LIMIT_ROWS, JournalWriter

TEXT_LIMIT = 4096
FIELDS_LIMIT = 16 * 1024


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """A started worker whose end is not recorded; after a crash of the supervisor it may still be running.

    `create_time_s` (of the process, wall clock) and `boot_id` distinguish it from another process with the same pid.
    """

    run: str
    generation: int
    pid: int
    create_time_s: float
    token: str
    boot_id: str
    batch_size: int | None
    effective_batch: int | None
    opened_s: float


@dataclass(frozen=True, slots=True)
class GenerationFigures:
    """Figures of one generation, from its steps and samples. Without a step, `batch_size` and `accumulation` are None.

    `train_s`: duration of all steps. `last_wall_s`: Unix time of the last step or sample; None without any.
    """

    first_step: int = 0
    last_step: int = 0
    batch_size: int | None = None
    accumulation: int | None = None
    train_s: float = 0.0
    last_wall_s: float | None = None
    peak_footprint_bytes: int = 0


class Journal:
    """The journal at `path`. `on_error(text)` is called from the writer thread, at most about once a minute.

    Raises JournalError when the file can't be opened. A damaged file is renamed and replaced by an empty one.
    """

    def __init__(
        self,
        path: Path,
        on_error: Callable[[str], None],
        retention: Retention | None = None,
        queue_limit: int = QUEUE_LIMIT_ROWS,
    ) -> None:
        self.path = path
        self._writer = JournalWriter(path, on_error, retention or Retention(), queue_limit)

    @property
    def dropped(self) -> int:
        """Rows lost since the journal was opened: the queue was full, or a row could not be stored."""
        return self._writer.dropped

    # ---- queued: never blocks, never raises

    def event(self, run: str, notice: act.Notice, wall_s: float) -> None:
        """One notice."""
        text = notice.text[:TEXT_LIMIT].encode("utf-8", "replace").decode("utf-8")
        words = (notice.kind, notice.severity.value, text, _encode_fields(notice.fields))
        self._writer.enqueue("events", (run, notice.generation, *words, wall_s))

    def step(self, run: str, report: ev.StepReport, footprint_bytes: int | None, wall_s: float) -> None:
        """One optimizer update. SQLite stores a NaN as NULL."""
        self._writer.enqueue("steps", row_of(run, report, footprint_bytes, wall_s))

    def sample(self, run: str, sample: ev.Sample, wall_s: float) -> None:
        """One memory sample."""
        self._writer.enqueue("samples", row_of(run, sample, wall_s))

    # ---- durable on return

    def save_history(self, run: str, snapshot: Mapping[str, object]) -> None:
        """Save the run's history. Raises JournalError when it is not durable; then it is kept and saved later."""
        text = _dump(snapshot, f"the history of {run}")
        sql = (
            "INSERT INTO runs (run, history, used_s) VALUES (?,?,?)"
            " ON CONFLICT (run) DO UPDATE SET history = excluded.history, used_s = excluded.used_s"
        )
        number = snapshot.get("generation")
        keep = history_of(run, number if isinstance(number, int) else 0, text)
        self._writer.durably(lambda connection: connection.execute(sql, (run, text, time.time())), keep)

    def open_generation(self, opened: OpenGeneration) -> None:
        """A worker is about to start, or was started. Raises JournalError when that is not durable."""
        used = "INSERT INTO runs (run, used_s) VALUES (?,?) ON CONFLICT (run) DO UPDATE SET used_s = excluded.used_s"

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(used, (opened.run, opened.opened_s))
            connection.execute("INSERT OR REPLACE INTO generations VALUES (?,?,?,?,?,?,?,?,?,NULL)", astuple(opened))

        self._writer.durably(write)

    def close_generation(self, run: str, generation: int, record: Mapping[str, object]) -> None:
        """The generation ended; `record` is its part of the summary.

        Raises JournalError when that is not durable; then it is kept and recorded later, at the latest by the next
        supervisor if the disk allowed to write the file `unsaved`.
        """
        text = _dump(record, f"the record of {run}'s generation {generation}")
        sql = "UPDATE generations SET record = ? WHERE run = ? AND generation = ?"

        def write(connection: sqlite3.Connection) -> None:
            if connection.execute(sql, (text, run, generation)).rowcount == 0:  # the journal was replaced meanwhile
                row = (run, generation, 0, 0.0, "", "", None, None, time.time(), text)
                connection.execute("INSERT INTO generations VALUES (?,?,?,?,?,?,?,?,?,?)", row)
            self._writer.transactions.count_inserted("generations", run)

        self._writer.durably(write, end_of(run, generation, text))

    def forget_run(self, run: str) -> None:
        """Delete everything about a run. Raises JournalError."""
        self._writer.durably(lambda connection: database.forget(connection, run))
        self._writer.of_unsaved(lambda unsaved: unsaved.forget(run))

    # ---- reading: sees everything queued before; raises JournalError

    def load_history(self, run: str) -> dict[str, Any] | None:
        """The history last saved; None without one, or when it is unreadable, which is reported."""
        rows = self._writer.select("SELECT history FROM runs WHERE run = ?", (run,))
        kept = self._writer.of_unsaved(lambda unsaved: unsaved.history(run))
        text = kept or (rows[0]["history"] if rows else None)
        if text is None:
            return None
        try:
            history = json.loads(text)
            if isinstance(history, dict):
                return history
        except ValueError:
            pass
        self._writer.report(f"{self.path}: the history of {run} is unreadable; the run starts without one")
        return None

    def open_generations(self) -> list[OpenGeneration]:
        """Generations without a recorded end, of every run."""
        rows = self._writer.select("SELECT * FROM generations WHERE record IS NULL ORDER BY run, generation", ())
        ended = self._writer.of_unsaved(lambda unsaved: unsaved.ends())
        found = [OpenGeneration(**{each.name: row[each.name] for each in fields(OpenGeneration)}) for row in rows]
        return [each for each in found if (each.run, each.generation) not in ended]

    def generations(self, run: str) -> list[dict[str, Any]]:
        """The records of a run's ended generations, in order."""
        sql = "SELECT generation, record FROM generations WHERE run = ? AND record IS NOT NULL ORDER BY generation"
        rows = self._writer.select(sql, (run,))
        return [{"generation": row["generation"], **json.loads(row["record"])} for row in rows]

    def figures(self, run: str, generation: int) -> GenerationFigures:
        """A generation's figures. SQLite computes them: the rows of a long one would not fit the daemon's memory."""
        of = "FROM {} WHERE run = ? AND generation = ?"
        sums = "SELECT min(id) AS first, max(id) AS last, sum(seconds) AS train_s, max(wall_s) AS wall_s, "
        sums += "max(footprint_bytes) AS peak "
        steps = self._writer.select(sums + of.format("steps"), (run, generation))[0]
        peaks = "SELECT max(footprint_bytes) AS peak, max(wall_s) AS wall_s "
        samples = self._writer.select(peaks + of.format("samples"), (run, generation))[0]
        last = [row["wall_s"] for row in (steps, samples) if row["wall_s"] is not None]
        last_wall_s, peak = max(last, default=None), max(samples["peak"] or 0, steps["peak"] or 0)
        if steps["first"] is None:
            return GenerationFigures(last_wall_s=last_wall_s, peak_footprint_bytes=peak)
        ends = "SELECT step, batch_size, accumulation FROM steps WHERE id IN (?1, ?2) ORDER BY id"
        rows = self._writer.select(ends, (steps["first"], steps["last"]))
        return GenerationFigures(
            rows[0]["step"],
            rows[-1]["step"],
            rows[-1]["batch_size"],
            rows[-1]["accumulation"],
            steps["train_s"],
            last_wall_s,
            peak,
        )

    def last_generation(self, run: str) -> int:
        """The highest generation number of the run, ended or not; 0 without any."""
        rows = self._writer.select("SELECT max(generation) AS last FROM generations WHERE run = ?", (run,))
        return rows[0]["last"] or 0

    def close(self) -> None:
        """Commit what is queued and close; a failure is reported, not raised. Calling it again does nothing."""
        self._writer.close()


def _dump(values: Mapping[str, object], what: str) -> str:
    try:
        return json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        raise JournalError(f"{what} is not plain data: {error}") from error


def _encode_fields(fields: Mapping[str, object]) -> str:
    try:
        encoded = json.dumps(dict(fields), default=str)
    except (TypeError, ValueError, RecursionError):
        return '{"unreadable": true}'
    return encoded if len(encoded) <= FIELDS_LIMIT else '{"truncated": true}'
