"""The journal's SQLite file: opened, checked, given its schema; moved aside when damaged."""

import contextlib
import os
import re
import sqlite3
import stat
from pathlib import Path

SCHEMA_VERSION = 1
DAMAGED_KEPT = 3
RUNS_KEPT = 256
"""Runs whose rows stay, the latest used first; settings files come and go over the years."""
BUSY_TIMEOUT_S = 5.0
CACHE_KIB = 256
"""Of pages kept in memory: the journal is written more than read; the default of 2 MiB is much for a small daemon."""
WAL_LIMIT_BYTES = 16 * 1024 * 1024

ROW_TABLES = ("events", "steps", "samples", "generations")

_SCHEMA = """
CREATE TABLE runs (run TEXT PRIMARY KEY, history TEXT, used_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (
    run TEXT NOT NULL, generation INTEGER NOT NULL, pid INTEGER NOT NULL, create_time_s REAL NOT NULL,
    token TEXT NOT NULL, boot_id TEXT NOT NULL, batch_size INTEGER, effective_batch INTEGER,
    opened_s REAL NOT NULL, record TEXT, PRIMARY KEY (run, generation)) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, generation INTEGER NOT NULL, kind TEXT NOT NULL,
    level TEXT NOT NULL, text TEXT NOT NULL, fields TEXT NOT NULL, wall_s REAL NOT NULL);
CREATE TABLE steps (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, generation INTEGER NOT NULL, step INTEGER NOT NULL, loss REAL,
    tokens INTEGER NOT NULL, seconds REAL NOT NULL, batch_size INTEGER NOT NULL, accumulation INTEGER NOT NULL,
    footprint_bytes INTEGER, active_bytes INTEGER NOT NULL, cache_bytes INTEGER NOT NULL,
    learning_rate REAL, wall_s REAL NOT NULL);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, generation INTEGER NOT NULL, footprint_bytes INTEGER NOT NULL,
    available_bytes INTEGER NOT NULL, processes INTEGER NOT NULL, wall_s REAL NOT NULL);
CREATE INDEX events_of_run ON events (run, id);
CREATE INDEX steps_of_run ON steps (run, id);
CREATE INDEX samples_of_run ON samples (run, id);
"""


class JournalError(Exception):
    """The journal could not be opened, or what had to be durable is not."""


class _DamagedError(Exception):
    """The file is not a sound SQLite database."""


def is_damage(error: Exception) -> bool:
    """Whether SQLite says that the file itself is broken, rather than that the disk is full or busy."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def wants_reopening(error: Exception) -> bool:
    """Whether a new connection may do what this one cannot any more."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.ProgrammingError) or (code is not None and code & 0xFF == sqlite3.SQLITE_IOERR)


def connect(path: Path) -> tuple[sqlite3.Connection, Path | None]:
    """The open journal, and where a damaged one was moved to make room for it (None: it was sound).

    Raises JournalError: the folder or file can't be used, or a newer version of this program wrote it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(path)
        try:
            return _open(path), None
        except _DamagedError:
            aside = move_aside(path)
            _make_private(path)
            return _open(path), aside
    except (OSError, sqlite3.Error, _DamagedError) as error:
        raise JournalError(f"{path}: cannot be opened: {error}") from error


def _make_private(path: Path) -> None:
    """An empty file of mode 0600 where there is none: SQLite gives its side files the same mode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _open(path: Path) -> sqlite3.Connection:
    # only the writer thread uses it after the constructor's thread made it
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        if is_damage(error):
            raise _DamagedError(str(error)) from error
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        text = f"{path}: found schema version {version}; allowed: up to {SCHEMA_VERSION}"
        raise JournalError(f"{text} (a newer mlx-supervisor wrote it: use that one, or move the file away)")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # queued rows; the writer switches to FULL where it must
    connection.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone leaves the data in the drive's cache
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise _DamagedError(str(verdict))
    if version == 0:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _DamagedError("tables of something else")
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    _forget_oldest(connection)


def _forget_oldest(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT run FROM runs ORDER BY used_s DESC LIMIT -1 OFFSET ?", (RUNS_KEPT,)).fetchall()
    for (run,) in rows:
        forget(connection, run)


def forget(connection: sqlite3.Connection, run: str) -> None:
    """Remove every row of a run; the caller commits, or nothing is open and each statement does."""
    for table in ("runs", *ROW_TABLES):
        connection.execute(f"DELETE FROM {table} WHERE run = ?", (run,))  # noqa: S608 - names of our own


def move_aside(path: Path) -> Path:
    """Rename a damaged journal and its side files to `NAME.damaged-N`; the oldest beyond `DAMAGED_KEPT` go."""
    pattern = re.compile(re.escape(path.name) + r"\.damaged-(\d{1,9})")
    matches = (pattern.fullmatch(found.name) for found in path.parent.iterdir())
    taken = sorted(int(match.group(1)) for match in matches if match)
    aside = path.with_name(f"{path.name}.damaged-{taken[-1] + 1 if taken else 1}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    for number in taken[: max(0, len(taken) + 1 - DAMAGED_KEPT)]:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(f"{path.name}.damaged-{number}{suffix}").unlink(missing_ok=True)
    return aside
