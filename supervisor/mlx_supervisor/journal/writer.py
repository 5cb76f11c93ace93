"""The journal's writer thread and its bounded queue."""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from mlx_supervisor.journal import database
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.tables import Row
from mlx_supervisor.journal.transactions import Retention, Transactions, Work
from mlx_supervisor.journal.unsaved import Record, Unsaved

QUEUE_LIMIT_ROWS = 10_000
BATCH_ROWS = 2_000
COMMIT_INTERVAL_S = 0.5
RETRY_INTERVAL_S = 2.0
REPORT_INTERVAL_S = 60.0
WAIT_LIMIT_S = 20.0
"""How long a caller waits for a durable write; well over SQLite's busy timeout."""

T = TypeVar("T")


class JournalWriter:
    """Owns the connection. `on_error` is called from the writer thread and from the constructor."""

    def __init__(self, path: Path, on_error: Callable[[str], None], retention: Retention, queue_limit: int) -> None:
        self.dropped = 0
        self.failures = 0
        self._path = path
        self._on_error = on_error
        self._queue_limit = queue_limit
        self._wake = threading.Condition()
        self._rows: deque[tuple[str, Row]] = deque()
        self._requests: deque[tuple[Work[Any], Future[Any], Record | None]] = deque()
        self._closing = False
        self._failing = False
        self._failure_reported = False
        self._retry_at_s = 0.0
        self._reported_at_s: float | None = None
        self._connection, damaged = database.connect(path)
        self._report_damage(damaged)
        self.transactions = Transactions(retention)
        self.transactions.trim_soon(self._connection)
        self.unsaved = Unsaved(path.with_name(f"{path.name}.unsaved"))
        self._save_unsaved()
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

    def durably(self, write: Work[object], keep: Record | None = None) -> None:
        """Run `write` in a transaction after everything queued before; it is on the disk then. Raises JournalError.

        `keep`: what to keep in `unsaved` and to write later when this fails.
        """
        self._call(lambda connection: self.transactions.commit_flushed(connection, write), keep)

    def of_unsaved(self, read: Callable[[Unsaved], T]) -> T:
        """The result of `read`, on the thread that owns `unsaved`. Raises JournalError."""
        return self._call(lambda _: read(self.unsaved))

    def select(self, sql: str, parameters: Row) -> list[dict[str, Any]]:
        """The rows of a query that sees everything queued before. Raises JournalError."""

        def read(connection: sqlite3.Connection) -> list[dict[str, Any]]:
            cursor = connection.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

        return self._call(read)

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

    def _call(self, work: Work[T], keep: Record | None = None) -> T:
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise JournalError(f"{self._path}: the journal is closed")
            self._requests.append((work, future, keep))
            self._wake.notify_all()
        try:
            return future.result(WAIT_LIMIT_S)
        except TimeoutError:
            raise JournalError(f"{self._path}: no answer within {WAIT_LIMIT_S:g} s") from None
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
            later = "" if keep is None else "; it is kept and written later"
            raise JournalError(f"{self._path}: {error}{later}") from error

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
            self._wake.wait_for(lambda: bool(self._rows or self._requests or self._closing), self._retry_in_s())
            self._wake.wait_for(lambda: self._is_urgent() or len(self._rows) >= BATCH_ROWS, COMMIT_INTERVAL_S)
            if self._failing:
                self._wake.wait_for(self._is_urgent, max(0.0, self._retry_at_s - time.monotonic()))
            requests, self._requests = self._requests, deque()
            batch, self._rows = self._rows, deque()
            closing = self._closing
        if batch:
            self._store(batch, last_try=closing)
        if self.unsaved:
            self._save_unsaved()
        for work, future, keep in requests:
            self._answer(work, future, keep)
        with self._wake:
            return closing and not self._rows and not self._requests

    def _retry_in_s(self) -> float | None:
        return max(self._retry_at_s - time.monotonic(), 0.0) if self.unsaved else None

    def _save_unsaved(self) -> None:
        count = len(self.unsaved)
        if count == 0:
            return
        try:
            self.transactions.commit_flushed(self._connection, self.unsaved.apply)
        except sqlite3.Error as error:
            self._failed(error)
            return
        self.unsaved.clear()
        self.report(f"{self._path}: wrote {count:,} records that were kept while it could not be written", urgent=True)

    def _is_urgent(self) -> bool:
        return bool(self._requests or self._closing)

    def _store(self, batch: deque[tuple[str, Row]], last_try: bool) -> None:
        try:
            self.dropped += self.transactions.insert(self._connection, batch)
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

    def _answer(self, work: Work[Any], future: "Future[Any]", keep: Record | None, retry: bool = True) -> None:
        try:
            result = work(self._connection)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and self._failed(error) and retry:
                self._answer(work, future, keep, retry=False)
                return
            if keep is not None:
                self.unsaved.add(keep)
            future.set_exception(error)
        else:
            if keep is not None:
                self.unsaved.discard(keep)
            future.set_result(result)

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
