"""Acknowledged writes to the journal survive SIGKILL, a full disk, a damaged file and a full queue."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.journal import database
from mlx_supervisor.journal import writer as journal_writer
from mlx_supervisor.journal.journal import GenerationFigures, Journal, JournalError, OpenGeneration
from mlx_supervisor.journal.transactions import Retention

DEADLINE_S = 20.0


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every connection that a journal opens from now on."""
    opened: list[sqlite3.Connection] = []
    connect = database.connect

    def noted(path: Path) -> tuple[sqlite3.Connection, Path | None]:
        connection, damaged = connect(path)
        opened.append(connection)
        return connection, damaged

    monkeypatch.setattr(database, "connect", noted)
    return opened


@pytest.fixture
def journal(tmp_path: Path, reports: list[str], connections: list[sqlite3.Connection]) -> Iterator[Journal]:
    journal = Journal(tmp_path / "state" / "journal.db", reports.append)
    yield journal
    journal.close()


def rows(journal: Journal, table: str, run: str = "night") -> list[dict[str, Any]]:
    """A run's rows, oldest first, with everything that was queued before."""
    with contextlib.suppress(JournalError):  # closed: everything is in the file
        journal.load_history(run)  # a read comes after the queue
    with closing(sqlite3.connect(journal.path)) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute(f"SELECT * FROM {table} WHERE run = ? ORDER BY id", (run,)).fetchall()
    plain = [dict(row) for row in found]
    return [row | {"fields": json.loads(row["fields"])} if "fields" in row else row for row in plain]


def add_event(journal: Journal, number: int, run: str = "night") -> None:
    journal.event(run, act.Notice("note", f"event {number}", generation=1, fields={"number": number}), 1000.0 + number)


def report(step: int, generation: int = 1, loss: float = 1.0, batch: int = 4) -> ev.StepReport:
    return ev.StepReport(0.0, generation, step, loss, 64, batch * 2, 1e-4, 0.5, batch, 2, 2000, 100)


def sample(footprint_bytes: int, generation: int = 1) -> ev.Sample:
    return ev.Sample(0.0, generation, footprint_bytes, 6, 7)


def add_step(journal: Journal, step: int, loss: float = 1.0) -> None:
    journal.step("night", report(step, loss=loss), 3000, 1000.0 + step)


def opened(generation: int, run: str = "night", opened_s: float = 1.0) -> OpenGeneration:
    return OpenGeneration(run, generation, 1, 1.0, "t", "b", None, None, opened_s)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def test_everything_is_found_after_reopening(journal: Journal, reports: list[str]) -> None:
    assert journal.load_history("night") is None
    journal.save_history("night", {"size": 4, "tripped": [8], "best": None})
    started = OpenGeneration("night", 1, 4242, 99.5, "secret", "boot", 4, 16, 1000.0)
    journal.open_generation(started)
    add_event(journal, 1)
    add_step(journal, 1)
    journal.sample("night", sample(5), 1000.0)
    journal.close()
    again = Journal(journal.path, reports.append)
    assert again.load_history("night") == {"size": 4, "tripped": [8], "best": None}
    assert again.open_generations() == [started]
    assert [(e["kind"], e["text"], e["fields"]) for e in rows(again, "events")] == [("note", "event 1", {"number": 1})]
    assert [(s["step"], s["loss"], s["footprint_bytes"]) for s in rows(again, "steps")] == [(1, 1.0, 3000)]
    assert [(s["footprint_bytes"], s["processes"]) for s in rows(again, "samples")] == [(5, 7)]
    again.close_generation("night", 1, {"batch_size": 4, "ended": "exit 0", "cause": None})
    assert again.open_generations() == []
    assert again.generations("night") == [{"generation": 1, "batch_size": 4, "ended": "exit 0", "cause": None}]
    again.close()
    assert reports == []


def test_generations_come_in_their_order(journal: Journal) -> None:
    for number in (2, 10, 1):
        journal.open_generation(opened(number))
        journal.close_generation("night", number, {"ended": f"end {number}"})
    assert [one["ended"] for one in journal.generations("night")] == ["end 1", "end 2", "end 10"]


def test_a_record_without_its_opening_is_kept(journal: Journal) -> None:
    journal.close_generation("night", 3, {"ended": "killed"})
    assert journal.generations("night") == [{"generation": 3, "ended": "killed"}]
    assert journal.open_generations() == []


def test_a_fresh_start_deletes_one_run_only(journal: Journal) -> None:
    for run in ("night", "day"):
        journal.save_history(run, {"of": run})
        journal.open_generation(opened(1, run))
        add_event(journal, 1, run)
    journal.forget_run("night")
    assert journal.load_history("night") is None
    assert rows(journal, "events") == []
    assert [one.run for one in journal.open_generations()] == ["day"]
    assert journal.load_history("day") == {"of": "day"}
    assert len(rows(journal, "events", "day")) == 1


def test_a_generations_figures(journal: Journal) -> None:
    assert journal.figures("night", 2) == GenerationFigures()
    for generation, step, batch, wall_s in (
        (1, 1, 8, 5.0),
        (2, 2, 8, 6.0),
        (2, 3, 8, 7.0),
        (2, 3, 4, 9.0),
        (3, 4, 4, 99.0),
    ):
        journal.step("night", report(step, generation, batch=batch), None, wall_s)
    assert journal.figures("night", 2) == GenerationFigures(2, 3, 4, 2, 1.5, 9.0, 0)
    journal.sample("night", sample(700, 2), 8.0)
    journal.sample("night", sample(500, 2), 11.0)
    journal.sample("day", sample(900, 2), 77.0)
    assert journal.figures("night", 2) == GenerationFigures(2, 3, 4, 2, 1.5, 11.0, 700)
    assert journal.figures("day", 2) == GenerationFigures(last_wall_s=77.0, peak_footprint_bytes=900)


def test_the_figures_of_a_long_generation_take_little_memory(journal: Journal) -> None:
    """The daemon may have died because the machine ran out of memory."""
    for number in range(20):
        for step in range(1000 * number, 1000 * (number + 1)):
            add_step(journal, step + 1)
        journal.load_history("night")  # waits for the queue
    tracemalloc.start()
    try:
        assert journal.figures("night", 1).last_step == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


def test_the_last_number_counts_ended_and_open_generations(journal: Journal) -> None:
    assert journal.last_generation("night") == 0
    for run, generation in (("night", 1), ("night", 2), ("day", 7)):
        journal.open_generation(opened(generation, run))
    journal.close_generation("night", 1, {})
    assert journal.last_generation("night") == 2
    journal.close_generation("night", 2, {})
    assert journal.last_generation("night") == 2


def test_only_the_owner_may_read_it(journal: Journal) -> None:
    add_event(journal, 1)
    journal.save_history("night", {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in journal.path.parent.iterdir()}
    assert modes["journal.db"] == 0o600
    assert set(modes.values()) == {0o600}
    assert journal.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.touch(0o644)
    Journal(path, print).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_queued_rows_are_committed_by_themselves(journal: Journal) -> None:
    add_event(journal, 1)
    reader = sqlite3.connect(journal.path)
    until(lambda: reader.execute("SELECT count(*) FROM events").fetchone()[0] == 1)
    reader.close()


WRITER = """
import sys
from pathlib import Path
from mlx_supervisor.core.actions import Notice
from mlx_supervisor.journal.journal import Journal
journal = Journal(Path(sys.argv[1]), print)
number = 0
while True:
    number += 1
    for _ in range(50):
        journal.event("night", Notice("note", "text " * 20, fields={"number": number}), 1.0)
    journal.save_history("night", {"number": number})
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    acknowledged = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(20):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            acknowledged = int((writer.stdout.read().split() or [str(acknowledged)])[-1])
        reports: list[str] = []
        journal = Journal(path, reports.append)
        history = journal.load_history("night")
        assert history is not None
        assert history["number"] >= acknowledged
        assert max(event["fields"]["number"] for event in rows(journal, "events")) >= acknowledged
        assert reports == []
        journal.close()


def test_a_full_queue_drops_counts_and_never_waits(tmp_path: Path, reports: list[str]) -> None:
    journal = Journal(tmp_path / "journal.db", reports.append, queue_limit=100)
    blocked = sqlite3.connect(journal.path, isolation_level=None)
    blocked.execute("BEGIN IMMEDIATE")  # the writer cannot commit
    began = time.monotonic()
    for number in range(1000):
        add_event(journal, number)
    assert time.monotonic() - began < 2.0
    assert journal.dropped >= 800
    blocked.execute("ROLLBACK")
    journal.load_history("night")  # waits for the queue
    kept = rows(journal, "events")
    assert len(kept) + journal.dropped == 1000
    assert len(kept) >= 100
    journal.close()


def test_rows_after_closing_are_counted_as_dropped(journal: Journal) -> None:
    journal.close()
    journal.close()
    add_event(journal, 1)
    assert journal.dropped == 1
    with pytest.raises(JournalError, match="closed"):
        journal.save_history("night", {})


def test_retention_keeps_the_newest_of_each_run(tmp_path: Path, reports: list[str]) -> None:
    retention = Retention(events=20, steps=10, samples=5, generations=4)
    journal = Journal(tmp_path / "journal.db", reports.append, retention)
    add_event(journal, 7, "day")
    for number in range(100):
        add_event(journal, number)
        add_step(journal, number)
        journal.sample("night", sample(number), 1.0)
        if number < 12:
            journal.open_generation(opened(number))
            journal.close_generation("night", number, {"n": number})
    journal.load_history("night")  # waits for the queue
    assert [event["fields"]["number"] for event in rows(journal, "events")][-20:] == list(range(80, 100))
    assert len(rows(journal, "events")) <= 22
    assert [step["step"] for step in rows(journal, "steps")][-10:] == list(range(90, 100))
    assert len(rows(journal, "steps")) <= 11
    assert [sample["footprint_bytes"] for sample in rows(journal, "samples")] == list(range(95, 100))
    assert [one["n"] for one in journal.generations("night")] == [8, 9, 10, 11]
    assert len(rows(journal, "events", "day")) == 1
    journal.close()


def test_a_supervisor_that_restarts_often_still_trims(tmp_path: Path, reports: list[str]) -> None:
    for number in range(30):
        journal = Journal(tmp_path / "journal.db", reports.append, Retention(events=20))
        add_event(journal, number)
        journal.close()
    journal = Journal(tmp_path / "journal.db", reports.append)
    assert len(rows(journal, "events")) <= 21
    journal.close()


def test_runs_not_used_for_long_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RUNS_KEPT", 3)
    journal = Journal(tmp_path / "journal.db", print)
    for number in range(5):
        journal.open_generation(opened(1, f"run{number}", float(number)))
    journal.close()
    journal = Journal(tmp_path / "journal.db", print)
    assert [one.run for one in journal.open_generations()] == ["run2", "run3", "run4"]
    journal.close()


def scribble(path: Path, where: float) -> None:
    """Overwrite a page's worth of bytes."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * where))
        file.write(b"\xa5" * min(6000, size))


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6])
def test_a_damaged_file_is_renamed_and_reported(tmp_path: Path, reports: list[str], where: float) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path, reports.append)
    for number in range(2000):
        add_event(journal, number)
    journal.save_history("night", {"old": True})
    journal.close()
    scribble(path, where)
    again = Journal(path, reports.append)
    assert again.load_history("night") is None
    again.save_history("night", {"new": True})
    assert again.load_history("night") == {"new": True}
    again.close()
    assert (tmp_path / "journal.db.damaged-1").exists()
    assert len(reports) == 1
    assert "damaged-1" in reports[0]
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_the_newest_damaged_copies_are_kept(tmp_path: Path, reports: list[str]) -> None:
    path = tmp_path / "journal.db"
    for number in range(12):
        path.write_bytes(b"not a database, try %d " % number * 100)
        Journal(path, reports.append).close()
    left = sorted(one.name for one in tmp_path.glob("journal.db.damaged-*"))
    assert left == ["journal.db.damaged-10", "journal.db.damaged-11", "journal.db.damaged-12"]
    assert len(reports) == 12


def test_a_file_damaged_while_open_is_replaced_and_writes_continue(
    journal: Journal, reports: list[str], connections: list[sqlite3.Connection]
) -> None:
    for number in range(3000):
        add_event(journal, number)
    journal.load_history("night")  # waits for the queue
    shut = sqlite3.connect(journal.path)
    shut.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shut.close()
    with journal.path.open("r+b") as file:
        file.write(b"\xa5" * journal.path.stat().st_size)
    # a new page cache is what any growth of the file would bring
    connections[0].execute("PRAGMA shrink_memory")
    journal.save_history("night", {"after": 1})
    assert journal.load_history("night") == {"after": 1}
    assert any("damaged-1" in text for text in reports)
    assert (journal.path.parent / "journal.db.damaged-1").exists()


def test_a_newer_version_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path, print).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 7")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"journal.db: found schema version 7; allowed: up to 1"):
        Journal(path, print)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*damaged*"))


def test_a_path_that_cannot_be_a_journal_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for bad in ("folder", "file/journal.db", "fifo"):
        with pytest.raises(JournalError, match="cannot be opened"):
            Journal(tmp_path / bad, print)


def test_the_database_of_another_program_is_not_written_into(tmp_path: Path, reports: list[str]) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    Journal(path, reports.append).close()
    with sqlite3.connect(tmp_path / "journal.db.damaged-1") as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["photos"]
    other.close()


def test_rows_that_cannot_be_stored_are_counted_and_the_others_kept(journal: Journal) -> None:
    add_step(journal, 1, float("nan"))
    add_step(journal, 2**70)
    odd: Any = {"bad": object(), "nan": float("nan")}
    journal.event("night", act.Notice("note", "\ud800 half a character", fields=odd), 1.0)
    journal.event("night", act.Notice("note", "long " * 10_000, fields={"long": "x" * 100_000}), 1.0)
    assert [(step["step"], step["loss"]) for step in rows(journal, "steps")] == [(1, None)]
    assert journal.dropped == 1
    first, second = rows(journal, "events")
    assert first["text"] == "? half a character"
    assert len(second["text"]) == 4096
    assert second["fields"] == {"truncated": True}


def test_a_history_that_is_not_plain_data_is_refused(journal: Journal) -> None:
    with pytest.raises(JournalError, match="not plain data"):
        journal.save_history("night", {"set": {1, 2}})
    assert journal.load_history("night") is None


def test_an_unreadable_history_is_reported_and_ignored(journal: Journal, reports: list[str]) -> None:
    journal.save_history("night", {})
    with sqlite3.connect(journal.path) as editor:
        editor.execute("UPDATE runs SET history = '{oops'")
    editor.close()
    assert journal.load_history("night") is None
    assert "history of night" in reports[0]


def test_a_full_disk_raises_only_where_durability_was_promised(
    journal: Journal, reports: list[str], connections: list[sqlite3.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "RETRY_INTERVAL_S", 0.05)
    journal.save_history("night", {"before": 1})
    pages = connections[0].execute("PRAGMA page_count").fetchone()[0]
    connections[0].execute(f"PRAGMA max_page_count = {pages}")
    for number in range(2000):
        journal.event("night", act.Notice("note", "x" * 1000), float(number))
    with pytest.raises(JournalError, match="full"):
        journal.save_history("night", {"big": "x" * 100_000})
    assert stored_history(journal) == {"before": 1}
    assert len(journal.load_history("night") or {}) == 1, "the newest is kept in memory"
    assert any("full" in text for text in reports)
    assert len(reports) <= 2
    connections[0].execute("PRAGMA max_page_count = 1000000")  # room again: the queued rows are not lost
    until(lambda: any("is writable again" in text for text in reports))
    assert len(rows(journal, "events")) == 2000
    until(lambda: "big" in stored_history(journal))
    journal.save_history("night", {"after": 1})
    assert journal.load_history("night") == {"after": 1}


def stored_history(journal: Journal) -> dict[str, Any]:
    with closing(sqlite3.connect(journal.path)) as reader:
        history = json.loads(reader.execute("SELECT history FROM runs").fetchone()[0])
    assert isinstance(history, dict)
    return history


LIMITED = """
import resource, sys
from pathlib import Path
from mlx_supervisor.core.actions import Notice
from mlx_supervisor.journal.journal import Journal, JournalError
reports = []
journal = Journal(Path(sys.argv[1]), reports.append)
journal.save_history("night", {"before": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
refused = 0
for number in range(300):
    journal.event("night", Notice("note", "x" * 4000), 1.0)
    try:
        journal.save_history("night", {"number": number})
        last = number
    except JournalError:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.save_history("night", {"number": "after"})
journal.close()
print(refused, last, len(reports))
"""


def test_a_file_size_limit_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, _, reported = map(int, done.stdout.split())
    assert refused > 0
    assert 1 <= reported <= 3
    journal = Journal(path, print)
    assert journal.load_history("night") == {"number": "after"}
    journal.close()


def test_a_faulty_callback_does_not_stop_the_writer(tmp_path: Path) -> None:
    def angry(text: str) -> None:
        raise RuntimeError(text)

    path = tmp_path / "journal.db"
    path.write_bytes(b"rubbish " * 1000)
    journal = Journal(path, angry)
    journal.save_history("night", {"fine": 1})
    assert journal.load_history("night") == {"fine": 1}
    journal.close()


def test_many_threads_may_write_and_read(journal: Journal) -> None:
    errors: list[BaseException] = []

    def work(run: str) -> None:
        try:
            for number in range(50):
                add_event(journal, number, run)
                journal.save_history(run, {"number": number})
                assert journal.load_history(run) == {"number": number}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"run{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert errors == []
    assert [len(rows(journal, "events", f"run{n}")) for n in range(4)] == [50] * 4


FIRST_VERSION = """
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
INSERT INTO steps VALUES (1, 'night', 1, 10, 2.5, 64, 0.5, 4, 2, 3000, 2000, 100, 1e-4, 5.0);
INSERT INTO samples VALUES (1, 'night', 1, 700, 6, 7, 6.0);
PRAGMA user_version = 1;
"""


def test_a_journal_of_the_first_version_gets_the_new_columns(tmp_path: Path, reports: list[str]) -> None:
    """The file on a user's disk, with the columns that the first version had."""
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(FIRST_VERSION)
    for _ in range(2):  # the second time there is nothing to add
        journal = Journal(path, reports.append)
        journal.close()
    journal = Journal(path, reports.append)
    add_step(journal, 11)
    journal.sample("night", sample(800), 1012.0)
    assert journal.figures("night", 1) == GenerationFigures(10, 11, 4, 2, 1.0, 1012.0, 3000)
    assert [(row["step"], row["samples"], row["phase"]) for row in rows(journal, "steps")] == [
        (10, None, None),
        (11, 8, "train"),
    ]
    assert [(row["footprint_bytes"], row["pressure"]) for row in rows(journal, "samples")] == [
        (700, None),
        (800, "normal"),
    ]
    journal.close()
    assert (journal.dropped, reports) == (0, [])


def test_a_step_has_a_column_for_every_field_of_its_report(journal: Journal) -> None:
    add_step(journal, 5)
    (row,) = rows(journal, "steps")
    expected = {each.name: getattr(report(5), each.name) for each in fields(ev.StepReport) if each.name != "at_s"}
    expected["metrics"] = None  # a mapping is stored as JSON, an empty one as NULL
    assert row == expected | {"id": 1, "run": "night", "footprint_bytes": 3000, "wall_s": 1005.0}
