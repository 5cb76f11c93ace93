"""What the journal could not store: kept in memory and in a file beside it, so that it is recorded later."""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ENDS_AT_MOST = 1000
"""Ends of generations in memory; the oldest are dropped first."""
ENDS_IN_A_FULL_FILE = 16
RESERVED_BYTES = 64 * 1024
"""Size of the file while the disk has room: on a full disk its blocks can still be overwritten."""
END = "end"
HISTORY = "history"


@dataclass(frozen=True, slots=True)
class Record:
    """`kind` END: `text` is the record of `generation`. `kind` HISTORY: `text` is the run's history of that moment."""

    kind: str
    run: str
    generation: int
    text: str
    wall_s: float

    @property
    def key(self) -> tuple[str, str, int]:
        """Equal for records of which only the latest counts."""
        return self.kind, self.run, self.generation if self.kind == END else 0


class Unsaved:
    """Use from one thread. Nothing raises OSError: the file is as good as the disk allows, the memory is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[tuple[str, str, int], Record] = {}
        for record in _read(path):
            self._records[record.key] = record
        self._write([*self._records.values()])

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """Keep a record that the journal refused; it replaces an older one of its key."""
        self._records.pop(record.key, None)
        self._records[record.key] = record
        ends = [key for key in self._records if key[0] == END]
        for key in ends[: max(0, len(ends) - ENDS_AT_MOST)]:
            del self._records[key]
        self._store()

    def discard(self, record: Record) -> None:
        """The journal has a later record of this key."""
        if self._records.pop(record.key, None) is not None:
            self._store()

    def forget(self, run: str) -> None:
        """Drop everything of a run."""
        kept = {key: record for key, record in self._records.items() if record.run != run}
        if len(kept) < len(self._records):
            self._records = kept
            self._store()

    def clear(self) -> None:
        """The journal has everything."""
        self._records = {}
        self._store()

    def ends(self) -> set[tuple[str, int]]:
        """Run and generation of each end that is kept."""
        return {(record.run, record.generation) for record in self._records.values() if record.kind == END}

    def history(self, run: str) -> str | None:
        """The history of a run that is kept, as JSON."""
        record = self._records.get((HISTORY, run, 0))
        return None if record is None else record.text

    def apply(self, connection: sqlite3.Connection) -> None:
        """Write all of it, in the caller's transaction. What the journal stored later stays. Raises sqlite3.Error."""
        for record in self._records.values():
            (_apply_end if record.kind == END else _apply_history)(connection, record)

    def _store(self) -> None:
        """As much as fits: everything, or the latest ends."""
        ends = [record for record in self._records.values() if record.kind == END]
        for records in ([*self._records.values()], ends, ends[-ENDS_IN_A_FULL_FILE:]):
            if self._write(records):
                return

    def _write(self, records: list[Record]) -> bool:
        """Overwrite the file in place: a new one would need room."""
        data = json.dumps([asdict(record) for record in records]).encode() if records else b""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            size = max(len(data), RESERVED_BYTES, os.fstat(descriptor).st_size)
            done, padded = 0, data.ljust(size)
            while done < size:
                done += os.pwrite(descriptor, padded[done:], done)
            os.fsync(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def end_of(run: str, generation: int, text: str) -> Record:
    """The end of a generation, now."""
    return Record(END, run, generation, text, time.time())


def history_of(run: str, generation: int, text: str) -> Record:
    """A run's history, now."""
    return Record(HISTORY, run, generation, text, time.time())


def _read(path: Path) -> Iterable[Record]:
    """The records in the file; none if it is missing, empty or torn."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        content = path.read_bytes().strip()
        return [Record(**each) for each in json.loads(content)] if content else []
    return []


def _apply_end(connection: sqlite3.Connection, record: Record) -> None:
    found = "SELECT record FROM generations WHERE run = ? AND generation = ?"
    row = connection.execute(found, (record.run, record.generation)).fetchone()
    if row is None:  # the journal was replaced meanwhile
        values = (record.run, record.generation, 0, 0.0, "", "", None, None, record.wall_s, record.text)
        connection.execute("INSERT INTO generations VALUES (?,?,?,?,?,?,?,?,?,?)", values)
    elif row[0] is None:
        update = "UPDATE generations SET record = ? WHERE run = ? AND generation = ?"
        connection.execute(update, (record.text, record.run, record.generation))


def _apply_history(connection: sqlite3.Connection, record: Record) -> None:
    row = connection.execute("SELECT history, used_s FROM runs WHERE run = ?", (record.run,)).fetchone()
    if row is not None and row[0] is not None and row[1] > record.wall_s and _generation(row[0]) >= record.generation:
        return
    sql = (
        "INSERT INTO runs (run, history, used_s) VALUES (?,?,?)"
        " ON CONFLICT (run) DO UPDATE SET history = excluded.history, used_s = excluded.used_s"
    )
    connection.execute(sql, (record.run, record.text, record.wall_s))


def _generation(history: str) -> int:
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(history)
        if isinstance(content, dict) and isinstance(number := content.get("generation"), int):
            return number
    return 0
