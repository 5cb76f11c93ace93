"""What the journal could not store is recorded later, by the same supervisor or by the next one."""

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_supervisor.journal import database, unsaved
from mlx_supervisor.journal import writer as journal_writer
from mlx_supervisor.journal.journal import Journal, JournalError, OpenGeneration

DEADLINE_S = 20.0
END = {"ended": "exit code 75", "cause": "memory leak"}


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    opened: list[sqlite3.Connection] = []
    connect = database.connect

    def noted(path: Path) -> tuple[sqlite3.Connection, Path | None]:
        connection, damaged = connect(path)
        opened.append(connection)
        return connection, damaged

    monkeypatch.setattr(database, "connect", noted)
    monkeypatch.setattr(journal_writer, "RETRY_INTERVAL_S", 0.05)
    return opened


@pytest.fixture
def journal(tmp_path: Path, connections: list[sqlite3.Connection]) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db", lambda text: None)
    yield journal
    journal.close()


def begin(journal: Journal, generation: int = 5) -> None:
    journal.open_generation(OpenGeneration("night", generation, 7, 1.0, "token", "boot", None, None, 1.0))


def make_full(connection: sqlite3.Connection) -> None:
    """SQLite reports a full disk for every write from now on."""
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")


def refused_end(journal: Journal, generation: int = 5) -> None:
    with pytest.raises(JournalError, match="kept and written later"):
        journal.close_generation("night", generation, END | {"autopsy": ["x" * 8000]})


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_an_end_is_recorded_once_there_is_room(journal: Journal, connections: list[sqlite3.Connection]) -> None:
    begin(journal)
    make_full(connections[0])
    refused_end(journal)
    assert journal.open_generations() == [], "else it counts as a worker of a dead supervisor"
    assert journal.generations("night") == []
    connections[0].execute("PRAGMA max_page_count = 1000000")
    until(lambda: bool(journal.generations("night")))
    assert journal.generations("night")[0]["cause"] == "memory leak"


def test_the_next_supervisor_records_the_end_and_the_history(
    tmp_path: Path, journal: Journal, connections: list[sqlite3.Connection]
) -> None:
    journal.save_history("night", {"generation": 5, "outcome": ""})
    begin(journal)
    make_full(connections[0])
    refused_end(journal)
    with pytest.raises(JournalError):
        journal.save_history("night", {"generation": 5, "outcome": "stopped", "long": "x" * 8000})
    after_a_kill = shutil.copytree(journal.path.parent, tmp_path.with_name(f"{tmp_path.name}-next"))
    reports: list[str] = []
    following = Journal(after_a_kill / "journal.db", reports.append)
    assert following.open_generations() == []
    assert [each["cause"] for each in following.generations("night")] == ["memory leak"]
    assert (following.load_history("night") or {})["outcome"] == "stopped"
    assert "wrote 2 records that were kept" in reports[0]
    following.close()
    assert (after_a_kill / "journal.db.unsaved").read_bytes().strip() == b""


def test_an_older_history_that_was_kept_never_replaces_a_newer_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    kept = unsaved.Unsaved(tmp_path / "journal.db.unsaved")
    kept.add(unsaved.Record("history", "night", 2, '{"generation": 2}', 1.0))
    kept.add(unsaved.Record("end", "night", 2, '{"cause": "old"}', 1.0))
    with contextlib.closing(database.connect(path)[0]) as connection:
        connection.execute("INSERT INTO runs VALUES ('night', '{\"generation\": 3}', 2.0)")
        connection.execute(
            "INSERT INTO generations VALUES ('night',2,0,0.0,'','',NULL,NULL,1.0,'{\"cause\": \"new\"}')"
        )
    journal = Journal(path, lambda text: None)
    assert journal.load_history("night") == {"generation": 3}
    assert journal.generations("night")[0]["cause"] == "new"
    journal.close()


def test_on_a_full_disk_the_file_is_overwritten_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.db.unsaved"
    kept = unsaved.Unsaved(path)
    written = os.pwrite

    def within(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > unsaved.RESERVED_BYTES:
            raise OSError(28, "No space left on device")
        return written(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", within)
    kept.add(unsaved.end_of("night", 1, '{"cause": "one"}'))
    kept.add(unsaved.history_of("night", 1, json.dumps({"long": "x" * 100_000})))
    kept.add(unsaved.end_of("night", 2, '{"cause": "two"}'))
    assert unsaved.Unsaved(path).ends() == {("night", 1), ("night", 2)}, "the ends come first"


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b'[{"kind": "end", "run"', b'[{"other": 1}]', b"[" * 100_000])
def test_a_torn_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    kept = unsaved.Unsaved(tmp_path / "file")
    assert len(kept) == 0
    kept.add(unsaved.end_of("night", 1, "{}"))
    assert len(unsaved.Unsaved(tmp_path / "file")) == 1


def test_memory_is_bounded_and_a_forgotten_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsaved, "ENDS_AT_MOST", 3)
    kept = unsaved.Unsaved(tmp_path / "no" / "such" / "folder")
    for generation in range(5):
        kept.add(unsaved.end_of("night", generation, "{}"))
    assert kept.ends() == {("night", 2), ("night", 3), ("night", 4)}
    kept.forget("night")
    assert len(kept) == 0
