"""Opening the journal's SQLite file: checks, schema, replacement of a damaged file."""

import contextlib
import os
import re
import shutil
import sqlite3
import stat
from pathlib import Path

from mlx_supervisor.journal import tables

SCHEMA_VERSION = 1
FULL_BYTES = 256 * 1024
"""With less, a journal cannot be opened."""
DAMAGED_KEPT = 3
RUNS_KEPT = 256
"""Runs whose rows are kept; those not used for the longest time are deleted first."""
BUSY_TIMEOUT_S = 5.0
CACHE_KIB = 256
"""SQLite's page cache; its default of 2 MiB is too much for a small daemon."""
WAL_LIMIT_BYTES = 16 * 1024 * 1024


class JournalError(Exception):
    """The journal can't be opened, or a durable write failed."""


class _DamagedError(Exception):
    """The file is not an intact journal."""


def is_damage(error: Exception) -> bool:
    """Whether SQLite reports a damaged file, and not a full disk or a lock."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def needs_reopening(error: Exception) -> bool:
    """Whether a new connection may succeed where this one fails."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.ProgrammingError) or (code is not None and code & 0xFF == sqlite3.SQLITE_IOERR)


def connect(path: Path) -> tuple[sqlite3.Connection, Path | None]:
    """The open journal, and the new path of a damaged one that was replaced (None: the file was intact).

    Raises JournalError: the folder or file can't be used, or a newer mlx-supervisor wrote it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(path)
        try:
            return _open(path), None
        except _DamagedError:
            damaged = set_aside(path)
            _make_private(path)
            return _open(path), damaged
    except (OSError, sqlite3.Error, _DamagedError) as error:
        raise JournalError(f"{path}: cannot be opened: {error}{_if_full(path)}") from error


def _if_full(path: Path) -> str:
    """What SQLite reports as an I/O error on a full disk."""
    with contextlib.suppress(OSError):
        return "; its disk is full" if shutil.disk_usage(path.parent).free < FULL_BYTES else ""
    return ""


def _make_private(path: Path) -> None:
    """Create the file with mode 0600 or correct its mode; SQLite gives its side files the same mode."""
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
    # created by the constructor's thread, then used by the writer thread only
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
        raise JournalError(f"{text} (written by a newer mlx-supervisor: use that version, or move the file away)")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # for queued rows; durable writes switch to FULL
    connection.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone leaves the data in the drive's cache
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise _DamagedError(str(verdict))
    if version == 0:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _DamagedError("it holds tables of another program")
        connection.executescript(f"BEGIN; {tables.schema()} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    else:
        tables.add_missing_columns(connection)
    _forget_oldest(connection)


def _forget_oldest(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT run FROM runs ORDER BY used_s DESC LIMIT -1 OFFSET ?", (RUNS_KEPT,)).fetchall()
    for (run,) in rows:
        forget(connection, run)


def forget(connection: sqlite3.Connection, run: str) -> None:
    """Delete every row of a run, in the caller's transaction if there is one."""
    for table in ("runs", *tables.ROW_TABLES):
        connection.execute(f"DELETE FROM {table} WHERE run = ?", (run,))  # noqa: S608 - constant names


def set_aside(path: Path) -> Path:
    """Rename a damaged journal and its side files to `NAME.damaged-N`; only the newest `DAMAGED_KEPT` are kept."""
    pattern = re.compile(re.escape(path.name) + r"\.damaged-(\d{1,9})")
    matches = (pattern.fullmatch(found.name) for found in path.parent.iterdir())
    taken = sorted(int(match.group(1)) for match in matches if match)
    damaged = path.with_name(f"{path.name}.damaged-{taken[-1] + 1 if taken else 1}")
    path.rename(damaged)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(damaged.with_name(damaged.name + suffix))
    for number in taken[: max(0, len(taken) + 1 - DAMAGED_KEPT)]:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(f"{path.name}.damaged-{number}{suffix}").unlink(missing_ok=True)
    return damaged
