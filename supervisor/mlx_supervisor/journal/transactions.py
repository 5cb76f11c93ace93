"""How the journal's rows are committed, and old ones trimmed."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from mlx_supervisor.journal.tables import INSERTS, Row

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


class Transactions:
    """Commits on the connection that the caller owns. Raises sqlite3.Error; then nothing is changed."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._untrimmed: Counter[tuple[str, str]] = Counter()

    def insert(self, connection: sqlite3.Connection, batch: Iterable[tuple[str, Row]]) -> int:
        """Insert rows in one transaction; returns how many can never be stored."""
        refused = 0

        def write(connection: sqlite3.Connection) -> None:
            nonlocal refused
            for table, row in batch:
                try:
                    connection.execute(INSERTS[table], row)
                except _NEVER_STORABLE:
                    refused += 1  # the others can be stored
                else:
                    self._untrimmed[table, row[0]] += 1

        self.commit(connection, write)
        return refused

    def count_inserted(self, table: str, run: str) -> None:
        """Count a row that a caller of `commit` inserted, for trimming."""
        self._untrimmed[table, run] += 1

    def commit_flushed(self, connection: sqlite3.Connection, write: Work[object]) -> None:
        """As `commit`; it is on the disk on return."""
        connection.execute("PRAGMA synchronous = FULL")
        try:
            self.commit(connection, write)
        finally:
            connection.execute("PRAGMA synchronous = NORMAL")

    def commit(self, connection: sqlite3.Connection, write: Work[object]) -> None:
        """Run `write` in a transaction, and trim what has grown enough."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            write(connection)
            self._trim(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # on a full disk SQLite has rolled back already
                connection.execute("ROLLBACK")
            raise

    def trim_soon(self, connection: sqlite3.Connection) -> None:
        """Trim all runs at the first commit: a supervisor that restarts often never counts far enough."""
        for table in INSERTS:
            for (run,) in connection.execute(f"SELECT DISTINCT run FROM {table}"):  # noqa: S608 - constant names
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
