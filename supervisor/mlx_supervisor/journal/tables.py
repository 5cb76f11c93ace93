"""The journal's tables. Steps and samples have a column for each field of their event; a new field adds a column.

Columns are only ever added: a journal written by an older version gets the missing ones, and an older version ignores
those that it does not know.
"""

import json
import sqlite3
from dataclasses import fields
from types import UnionType
from typing import Any, get_args

from mlx_supervisor.core import events as ev

Row = tuple[Any, ...]


def _columns_of(event: type[ev.WorkerEvent]) -> dict[str, str]:
    return {each.name: _sql_type(each.type) for each in fields(event) if each.name != "at_s"}  # at_s: monotonic clock


def _sql_type(kind: Any) -> str:
    plain = get_args(kind)[0] if isinstance(kind, UnionType) else kind
    return {int: "INTEGER", bool: "INTEGER", float: "REAL"}.get(plain, "TEXT")


_WALL = {"wall_s": "REAL NOT NULL"}
_EVENT = {"generation": "INTEGER NOT NULL", **dict.fromkeys(("kind", "level", "text", "fields"), "TEXT NOT NULL")}
COLUMNS = {
    "events": {"run": "TEXT NOT NULL", **_EVENT, **_WALL},
    "steps": {"run": "TEXT NOT NULL", **_columns_of(ev.StepReport), "footprint_bytes": "INTEGER", **_WALL},
    "samples": {"run": "TEXT NOT NULL", **_columns_of(ev.Sample), **_WALL},
}
"""The tables of queued rows; each also has an `id`, which gives the order."""
INSERTS = {
    table: f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
    for table, columns in COLUMNS.items()
}
ROW_TABLES = (*COLUMNS, "generations")
_OTHERS = """
CREATE TABLE runs (run TEXT PRIMARY KEY, history TEXT, used_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (
    run TEXT NOT NULL, generation INTEGER NOT NULL, pid INTEGER NOT NULL, create_time_s REAL NOT NULL,
    token TEXT NOT NULL, boot_id TEXT NOT NULL, batch_size INTEGER, effective_batch INTEGER,
    opened_s REAL NOT NULL, record TEXT, PRIMARY KEY (run, generation)) WITHOUT ROWID;
"""


def schema() -> str:
    """The SQL that makes an empty database a journal."""
    rows = "".join(
        f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {', '.join(map(' '.join, columns.items()))});\n"
        f"CREATE INDEX {table}_of_run ON {table} (run, id);\n"
        for table, columns in COLUMNS.items()
    )
    return _OTHERS + rows


def add_missing_columns(connection: sqlite3.Connection) -> None:
    """Bring an older journal up to date; old rows have NULL in the new columns."""
    for table, columns in COLUMNS.items():
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        for name in columns.keys() - known:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name].removesuffix(' NOT NULL')}")


def row_of(run: str, event: ev.StepReport | ev.Sample, *more: object) -> Row:
    """An event as a row of its table. `more`: the columns that the event lacks, in order."""
    return (run, *(_plain(getattr(event, name)) for name in _FIELDS[type(event)]), *more)


def _plain(value: Any) -> Any:
    """A mapping as JSON, an empty one as NULL."""
    return (json.dumps(value) if value else None) if isinstance(value, dict) else value


_FIELDS = {event: tuple(_columns_of(event)) for event in (ev.StepReport, ev.Sample)}
