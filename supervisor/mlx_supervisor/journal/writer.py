"""The journal's writer thread and its bounded queue."""

import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_supervisor.journal import database
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.tables import INSERTS, Row

QUEUE_LIMIT_ROWS = 10_000
BATCH_ROWS = 2_000
COMMIT_INTERVAL_S = 0.5
RETRY_INTERVAL_S = 2.0
REPORT_INTERVAL_S = 60.0
WAIT_LIMIT_S = 20.0
"""How long a caller waits for a durable write; well over SQLite's busy timeout."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

_NEVER_STORABLE = (sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.IntegrityError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class Retention:
    """Rows kept of each run; up to a tenth more until the next trim."""

    events: int = 100_000
    steps: int = 200_000
    samples: int = 50_000
    generations: int = 10_000


class JournalWriter:
    """Owns the connection. `on_error` is called from the writer thread and from the constructor."""

    def __init__(self, path: Path, on_error: Callable[[str], None], retention: Retention, queue_limit: int) -> None:
        self.dropped = 0
        self.failures = 0
        self._path = path
        self._on_error = on_error
        self._retention = retention
        self._queue_limit = queue_limit
        self._wake = threading.Condition()
        self._rows: deque[tuple[str, Row]] = deque()
        self._requests: deque[tuple[Work[Any], Future[Any]]] = deque()
        self._closing = False
        self._failing = False
        self._failure_reported = False
        self._retry_at_s = 0.0
        self._reported_at_s: float | None = None
        self._untrimmed: Counter[tuple[str, str]] = Counter()
        self._connection, damaged = database.connect(path)
        self._report_damage(damaged)
        self._trim_soon()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    # ---- for callers, on any thread

    def enqueue(self, table: str, row: Row) -> None:
        """Queue a row; when the queue is full or closed, drop and count it."""
        with self._wake:
            if self._closing or len(self._rows) >= self._queue_limit:
                self.dropped += 1
                return
            self._rows.append((table, row))
            if len(self._rows) in (1, BATCH_ROWS):
                self._wake.notify_all()

    def durably(self, write: Work[object]) -> None:
        """Run `write` in a transaction after everything queued before; it is on the disk then. Raises JournalError."""

        def transaction(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA synchronous = FULL")
            try:
                self._commit(connection, write)
            finally:
                connection.execute("PRAGMA synchronous = NORMAL")

        self._call(transaction)

    def select(self, sql: str, parameters: Row) -> list[dict[str, Any]]:
        """The rows of a query that sees everything queued before. Raises JournalError."""

        def read(connection: sqlite3.Connection) -> list[dict[str, Any]]:
            cursor = connection.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

        return self._call(read)

    def count_inserted(self, table: str, run: str) -> None:
        """Count a row inserted by `durably`, for trimming."""
        self._untrimmed[table, run] += 1

    def report(self, text: str, urgent: bool = False) -> bool:
        """Report an error, unless urgent at most once a minute. Returns whether it was reported."""
        now_s = time.monotonic()
        if not urgent and self._reported_at_s is not None and now_s - self._reported_at_s < REPORT_INTERVAL_S:
            return False
        self._reported_at_s = now_s
        try:
            self._on_error(text)
        except Exception:
            self.failures += 1
        return True

    def close(self) -> None:
        """Store what is queued and end the thread. Calling it again does nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(WAIT_LIMIT_S)

    def _call(self, work: Work[T]) -> T:
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise JournalError(f"{self._path}: the journal is closed")
            self._requests.append((work, future))
            self._wake.notify_all()
        try:
            return future.result(WAIT_LIMIT_S)
        except TimeoutError:
            raise JournalError(f"{self._path}: no answer within {WAIT_LIMIT_S:g} s") from None
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
            raise JournalError(f"{self._path}: {error}") from error

    # ---- on the writer thread

    def _work(self) -> None:
        done = False
        while not done:
            try:
                done = self._work_once()
            except Exception as error:  # the writer thread must survive any error
                self.failures += 1
                self.report(f"{self._path}: {type(error).__name__}: {error}")
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.close()
        except sqlite3.Error as error:
            self.report(f"{self._path}: {error}")

    def _work_once(self) -> bool:
        """Wait for work and do it. Returns True when closing and nothing is left to do."""
        with self._wake:
            self._wake.wait_for(lambda: bool(self._rows or self._requests or self._closing))
            self._wake.wait_for(lambda: self._is_urgent() or len(self._rows) >= BATCH_ROWS, COMMIT_INTERVAL_S)
            if self._failing:
                self._wake.wait_for(self._is_urgent, max(0.0, self._retry_at_s - time.monotonic()))
            requests, self._requests = self._requests, deque()
            batch, self._rows = self._rows, deque()
            closing = self._closing
        if batch:
            self._store(batch, last_try=closing)
        for work, future in requests:
            self._answer(work, future)
        with self._wake:
            return closing and not self._rows and not self._requests

    def _is_urgent(self) -> bool:
        return bool(self._requests or self._closing)

    def _store(self, batch: deque[tuple[str, Row]], last_try: bool) -> None:
        try:
            self._commit(self._connection, lambda connection: self._insert(connection, batch))
        except sqlite3.Error as error:
            self._put_back(batch, last_try)
            self._failed(error)
            return
        self._failing = False
        if self._failure_reported:
            self._failure_reported = False
            self.report(f"{self._path} is writable again; {self.dropped:,} rows lost so far", urgent=True)

    def _put_back(self, batch: deque[tuple[str, Row]], last_try: bool) -> None:
        """Requeue the newest rows that fit."""
        with self._wake:
            room = 0 if last_try else self._queue_limit - len(self._rows)
            while len(batch) > max(0, room):
                batch.popleft()
                self.dropped += 1
            self._rows.extendleft(reversed(batch))

    def _answer(self, work: Work[Any], future: "Future[Any]", retry: bool = True) -> None:
        try:
            future.set_result(work(self._connection))
        except Exception as error:
            if isinstance(error, sqlite3.Error) and self._failed(error) and retry:
                self._answer(work, future, retry=False)
            else:
                future.set_exception(error)

    def _failed(self, error: sqlite3.Error) -> bool:
        """Report the error and reopen the file where that may help. Returns whether to retry at once."""
        self.failures += 1
        self._failing = True
        self._retry_at_s = time.monotonic() + RETRY_INTERVAL_S
        text = f"{self._path} cannot be written: {error}; {self.dropped:,} rows lost so far"
        self._failure_reported = self.report(text) or self._failure_reported
        damaged = database.is_damage(error)
        if not damaged and not database.needs_reopening(error):
            return False
        try:
            self._connection.close()
            replaced = database.set_aside(self._path) if damaged else None
            self._connection, found = database.connect(self._path)
        except (OSError, JournalError, sqlite3.Error) as again:
            self.report(f"{self._path} cannot be reopened: {again}", urgent=True)
            return False
        self._report_damage(replaced or found)
        return True

    def _report_damage(self, damaged: Path | None) -> None:
        if damaged is not None:
            text = f"{self._path} was damaged and renamed to {damaged.name}; the new journal has no run histories"
            self.report(text, urgent=True)

    def _commit(self, connection: sqlite3.Connection, write: Work[object]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            write(connection)
            self._trim(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # on a full disk SQLite has rolled back already
                connection.execute("ROLLBACK")
            raise

    def _insert(self, connection: sqlite3.Connection, batch: deque[tuple[str, Row]]) -> None:
        for table, row in batch:
            try:
                connection.execute(INSERTS[table], row)
            except _NEVER_STORABLE:
                self.dropped += 1  # this row can't be stored; the others can
            else:
                self._untrimmed[table, row[0]] += 1

    def _trim_soon(self) -> None:
        """Trim all runs at the first commit: a supervisor that restarts often never counts far enough."""
        for table in INSERTS:
            for (run,) in self._connection.execute(f"SELECT DISTINCT run FROM {table}"):  # noqa: S608 - constant names
                self._untrimmed[table, run] = getattr(self._retention, table)

    def _trim(self, connection: sqlite3.Connection) -> None:
        for (table, run), count in list(self._untrimmed.items()):
            kept = getattr(self._retention, table)
            if count < max(1, kept // 10):
                continue
            key = "generation" if table == "generations" else "id"
            connection.execute(
                f"DELETE FROM {table} WHERE run = ?1 AND {key} <="  # noqa: S608 - constant names
                f" (SELECT {key} FROM {table} WHERE run = ?1 ORDER BY {key} DESC LIMIT 1 OFFSET ?2)",
                (run, kept),
            )
            del self._untrimmed[table, run]
