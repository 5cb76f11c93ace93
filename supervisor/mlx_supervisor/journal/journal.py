"""What happened, kept in SQLite: it survives the supervisor.

One thread writes. Events, steps and samples are queued and committed about once a second; the queue is bounded and
the caller never waits: what does not fit is dropped and counted. Histories and generations are durable on return.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_supervisor.journal import database
from mlx_supervisor.journal.database import JournalError as JournalError
from mlx_supervisor.journal.writer import QUEUE_LIMIT_ROWS, Retention, Writer

TEXT_LIMIT = 4096
FIELDS_LIMIT = 16 * 1024


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """A worker that was started and whose end nobody has recorded: after a crash of ours it may still live.

    `create_time_s` (of the process, wall clock) and `boot_id` tell it from another process with the same pid.
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
    """What steps and samples tell of one life. Without any step, `batch_size` and `accumulation` are None.

    `train_s`: what the steps took. `last_wall_s`: of the last sign of life (Unix seconds); None without any.
    """

    first_step: int = 0
    last_step: int = 0
    batch_size: int | None = None
    accumulation: int | None = None
    train_s: float = 0.0
    last_wall_s: float | None = None
    peak_footprint_bytes: int = 0


class Journal:
    """The journal at `path`; `on_error` is told in words, from the writer's thread, at most about once a minute.

    Raises JournalError when it can't be opened. A damaged file is moved aside and a new one begun.
    """

    def __init__(
        self,
        path: Path,
        on_error: Callable[[str], None],
        retention: Retention | None = None,
        queue_limit: int = QUEUE_LIMIT_ROWS,
    ) -> None:
        self.path = path
        self._writer = Writer(path, on_error, retention or Retention(), queue_limit)

    @property
    def dropped(self) -> int:
        """Rows lost: the queue was full, or a row could not be stored."""
        return self._writer.dropped

    @property
    def failures(self) -> int:
        """Commits that failed."""
        return self._writer.failures

    # Queued: never blocks, never raises.

    def event(
        self, run: str, generation: int, kind: str, level: str, text: str, fields: Mapping[str, object], wall_s: float
    ) -> None:
        """Something happened, in one sentence."""
        row = (run, generation, str(kind), str(level), _clean(text), _encode_fields(fields), wall_s)
        self._writer.enqueue("events", row)

    def step(
        self,
        run: str,
        generation: int,
        step: int,
        loss: float,
        tokens: int,
        seconds: float,
        batch_size: int,
        accumulation: int,
        footprint_bytes: int | None,
        active_bytes: int,
        cache_bytes: int,
        learning_rate: float,
        wall_s: float,
    ) -> None:
        """One optimizer update. A loss that is not a number is kept as none."""
        shape = (batch_size, accumulation, footprint_bytes, active_bytes, cache_bytes)
        self._writer.enqueue("steps", (run, generation, step, loss, tokens, seconds, *shape, learning_rate, wall_s))

    def sample(
        self, run: str, generation: int, footprint_bytes: int, available_bytes: int, processes: int, wall_s: float
    ) -> None:
        """One reading of memory."""
        self._writer.enqueue("samples", (run, generation, footprint_bytes, available_bytes, processes, wall_s))

    # Durable on return, or JournalError.

    def save_history(self, run: str, snapshot: Mapping[str, object]) -> None:
        """Keep the run's history. Raises JournalError when it is not durable."""
        try:
            text = json.dumps(dict(snapshot))
        except (TypeError, ValueError) as error:
            raise JournalError(f"the history of {run} is not plain data: {error}") from error
        sql = (
            "INSERT INTO runs (run, history, used_s) VALUES (?,?,?)"
            " ON CONFLICT (run) DO UPDATE SET history = excluded.history, used_s = excluded.used_s"
        )
        self._writer.durably(lambda connection: connection.execute(sql, (run, text, time.time())))

    def open_generation(
        self,
        run: str,
        generation: int,
        pid: int,
        create_time_s: float,
        token: str,
        boot_id: str,
        batch_size: int | None,
        effective_batch: int | None,
        wall_s: float,
    ) -> None:
        """A worker was started. Raises JournalError when that is not durable."""
        row = (run, generation, pid, create_time_s, token, boot_id, batch_size, effective_batch, wall_s)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO runs (run, used_s) VALUES (?,?) ON CONFLICT (run) DO UPDATE SET used_s = excluded.used_s",
                (run, wall_s),
            )
            connection.execute("INSERT OR REPLACE INTO generations VALUES (?,?,?,?,?,?,?,?,?,NULL)", row)

        self._writer.durably(write)

    def close_generation(self, run: str, generation: int, record: Mapping[str, object]) -> None:
        """A worker's life is over; `record` is its line of the summary. Raises JournalError."""
        try:
            text = json.dumps(dict(record))
        except (TypeError, ValueError) as error:
            raise JournalError(f"the record of {run}'s generation {generation} is not plain data: {error}") from error
        sql = "UPDATE generations SET record = ? WHERE run = ? AND generation = ?"

        def write(connection: sqlite3.Connection) -> None:
            if connection.execute(sql, (text, run, generation)).rowcount == 0:  # the journal was begun anew meanwhile
                row = (run, generation, 0, 0.0, "", "", None, None, time.time(), text)
                connection.execute("INSERT INTO generations VALUES (?,?,?,?,?,?,?,?,?,?)", row)
            self._writer.count_inserted("generations", run)

        self._writer.durably(write)

    def forget_run(self, run: str) -> None:
        """Remove all of a run, for a fresh start. Raises JournalError."""
        self._writer.durably(lambda connection: database.forget(connection, run))

    # Reading: sees all that was queued before. Raises JournalError.

    def load_history(self, run: str) -> dict[str, Any] | None:
        """The history last saved; None when there is none, or none that can be read (which is reported)."""
        rows = self._writer.select("SELECT history FROM runs WHERE run = ?", (run,))
        if not rows or rows[0]["history"] is None:
            return None
        try:
            history = json.loads(rows[0]["history"])
            if isinstance(history, dict):
                return history
        except ValueError:
            pass
        self._writer.tell(f"the history of {run} in {self.path} cannot be read; the run begins without one")
        return None

    def open_generations(self) -> list[OpenGeneration]:
        """Workers without a recorded end, of every run."""
        rows = self._writer.select("SELECT * FROM generations WHERE record IS NULL ORDER BY run, generation", ())
        rows = [{key: row[key] for key in OpenGeneration.__dataclass_fields__} for row in rows]
        return [OpenGeneration(**row) for row in rows]

    def generations(self, run: str) -> list[dict[str, Any]]:
        """The records of a run's finished lives, in order."""
        sql = "SELECT generation, record FROM generations WHERE run = ? AND record IS NOT NULL ORDER BY generation"
        return [
            {"generation": row["generation"], **json.loads(row["record"])} for row in self._writer.select(sql, (run,))
        ]

    def life(self, run: str, generation: int) -> GenerationFigures:
        """One life in figures: SQLite adds them up, as the rows of a long one would take the daemon's size tenfold."""
        of = "FROM {} WHERE run = ? AND generation = ?"
        sums = "SELECT min(id) AS first, max(id) AS last, sum(seconds) AS train_s, max(wall_s) AS wall_s "
        steps = self._writer.select(sums + of.format("steps"), (run, generation))[0]
        peaks = "SELECT max(footprint_bytes) AS peak, max(wall_s) AS wall_s "
        samples = self._writer.select(peaks + of.format("samples"), (run, generation))[0]
        signs = [row["wall_s"] for row in (steps, samples) if row["wall_s"] is not None]
        last_wall_s, peak = max(signs, default=None), samples["peak"] or 0
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
        """The highest number that a life of this run ever had, ended or not; 0 without any."""
        rows = self._writer.select("SELECT max(generation) AS last FROM generations WHERE run = ?", (run,))
        return rows[0]["last"] or 0

    def events(self, run: str, limit: int = 1000) -> list[dict[str, Any]]:
        """The run's latest events, oldest first; `fields` as a mapping."""
        sql = "SELECT generation, kind, level, text, fields, wall_s FROM events WHERE run = ? ORDER BY id DESC LIMIT ?"
        rows = self._writer.select(sql, (run, limit))
        return [{**row, "fields": json.loads(row["fields"])} for row in reversed(rows)]

    def steps(self, run: str, limit: int = 200_000, generation: int | None = None) -> list[dict[str, Any]]:
        """The run's latest step reports, or one life's, in the order in which they came; replayed steps come again."""
        return self._latest("steps", run, limit, generation)

    def samples(self, run: str, limit: int = 50_000, generation: int | None = None) -> list[dict[str, Any]]:
        """The run's latest readings of memory, or one life's, oldest first."""
        return self._latest("samples", run, limit, generation)

    def _latest(self, table: str, run: str, limit: int, generation: int | None) -> list[dict[str, Any]]:
        sql = f"SELECT * FROM {table} WHERE run = ?1 AND (?2 IS NULL OR generation = ?2) ORDER BY id DESC LIMIT ?3"  # noqa: S608 - a name of our own
        rows = self._writer.select(sql, (run, generation, limit))
        return [{key: row[key] for key in row if key != "id"} for row in reversed(rows)]

    def flush(self) -> None:
        """Commit what is queued, durably. Raises JournalError."""
        self._writer.durably(lambda connection: None)

    def close(self) -> None:
        """Commit what is queued and close; a failure is reported, not raised. Calling it again does nothing."""
        self._writer.close()


def _clean(text: str) -> str:
    return text[:TEXT_LIMIT].encode("utf-8", "replace").decode("utf-8")


def _encode_fields(fields: Mapping[str, object]) -> str:
    try:
        encoded = json.dumps(dict(fields), default=str)
    except (TypeError, ValueError, RecursionError):
        return '{"unreadable": true}'
    return encoded if len(encoded) <= FIELDS_LIMIT else '{"truncated": true}'
