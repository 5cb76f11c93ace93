"""The journal keeps what it said it kept: across SIGKILL, a full disk, a damaged file and a full queue."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_supervisor.journal import writer as journal_writer
from mlx_supervisor.journal.journal import GenerationFigures, Journal, JournalError, OpenGeneration, database
from mlx_supervisor.journal.writer import Retention

DEADLINE_S = 20.0


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def journal(tmp_path: Path, told: list[str]) -> Iterator[Journal]:
    journal = Journal(tmp_path / "state" / "journal.db", told.append)
    yield journal
    journal.close()


def add_event(journal: Journal, number: int, run: str = "night") -> None:
    journal.event(run, 1, "note", "info", f"event {number}", {"number": number}, 1000.0 + number)


def add_step(journal: Journal, step: int, loss: float = 1.0) -> None:
    journal.step("night", 1, step, loss, 64, 0.5, 4, 2, 3000, 2000, 100, 1e-4, 1000.0 + step)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        time.sleep(0.005)


def test_everything_is_there_after_reopening(journal: Journal, told: list[str]) -> None:
    assert journal.load_history("night") is None
    journal.save_history("night", {"size": 4, "tripped": [8], "best": None})
    journal.open_generation("night", 1, 4242, 99.5, "secret", "boot", 4, 16, 1000.0)
    add_event(journal, 1)
    add_step(journal, 1)
    journal.sample("night", 1, 5, 6, 7, 1000.0)
    journal.close()
    again = Journal(journal.path, told.append)
    assert again.load_history("night") == {"size": 4, "tripped": [8], "best": None}
    assert again.open_generations() == [OpenGeneration("night", 1, 4242, 99.5, "secret", "boot", 4, 16, 1000.0)]
    assert [(e["kind"], e["text"], e["fields"]) for e in again.events("night")] == [("note", "event 1", {"number": 1})]
    assert [(s["step"], s["loss"], s["footprint_bytes"]) for s in again.steps("night")] == [(1, 1.0, 3000)]
    assert [(s["footprint_bytes"], s["processes"]) for s in again.samples("night")] == [(5, 7)]
    again.close_generation("night", 1, {"batch_size": 4, "ended": "exit 0", "cause": None})
    assert again.open_generations() == []
    assert again.generations("night") == [{"generation": 1, "batch_size": 4, "ended": "exit 0", "cause": None}]
    again.close()
    assert told == []


def test_generations_come_in_their_order(journal: Journal) -> None:
    for number in (2, 10, 1):
        journal.open_generation("night", number, 1, 1.0, "t", "b", None, None, 1.0)
        journal.close_generation("night", number, {"ended": f"end {number}"})
    assert [one["ended"] for one in journal.generations("night")] == ["end 1", "end 2", "end 10"]


def test_a_record_without_its_opening_is_kept(journal: Journal) -> None:
    journal.close_generation("night", 3, {"ended": "killed"})
    assert journal.generations("night") == [{"generation": 3, "ended": "killed"}]
    assert journal.open_generations() == []


def test_a_fresh_start_forgets_one_run_and_leaves_the_others(journal: Journal) -> None:
    for run in ("night", "day"):
        journal.save_history(run, {"of": run})
        journal.open_generation(run, 1, 1, 1.0, "t", "b", None, None, 1.0)
        add_event(journal, 1, run)
    journal.forget_run("night")
    assert journal.load_history("night") is None
    assert journal.events("night") == []
    assert [one.run for one in journal.open_generations()] == ["day"]
    assert journal.load_history("day") == {"of": "day"}
    assert len(journal.events("day")) == 1


def test_the_steps_and_samples_of_one_life_are_had_alone(journal: Journal) -> None:
    for generation in (1, 2, 2):
        journal.step("night", generation, 10 + generation, 1.0, 1, 0.5, 1, 1, None, 1, 1, 1e-4, 1.0)
        journal.sample("night", generation, generation, 1, 1, 1.0)
    assert [step["step"] for step in journal.steps("night", generation=2)] == [12, 12]
    assert [step["step"] for step in journal.steps("night", 2)] == [12, 12]
    assert [sample["footprint_bytes"] for sample in journal.samples("night", generation=1)] == [1]
    assert len(journal.steps("night")) == 3


def test_a_life_is_told_in_figures(journal: Journal) -> None:
    assert journal.life("night", 2) == GenerationFigures()
    for generation, step, batch, wall_s in (
        (1, 1, 8, 5.0),
        (2, 2, 8, 6.0),
        (2, 3, 8, 7.0),
        (2, 3, 4, 9.0),
        (3, 4, 4, 99.0),
    ):
        journal.step("night", generation, step, 1.0, 1, 0.5, batch, 8 // batch, None, 1, 1, 1e-4, wall_s)
    assert journal.life("night", 2) == GenerationFigures(2, 3, 4, 2, 1.5, 9.0, 0)
    journal.sample("night", 2, 700, 1, 1, 8.0)
    journal.sample("night", 2, 500, 1, 1, 11.0)
    journal.sample("day", 2, 900, 1, 1, 77.0)
    assert journal.life("night", 2) == GenerationFigures(2, 3, 4, 2, 1.5, 11.0, 700)
    assert journal.life("day", 2) == GenerationFigures(last_wall_s=77.0, peak_footprint_bytes=900)


def test_a_long_life_is_told_in_little_memory(journal: Journal) -> None:
    """The daemon stays small; it may just have died of a machine without memory."""
    for number in range(20):
        for step in range(1000 * number, 1000 * (number + 1)):
            add_step(journal, step + 1)
        journal.flush()
    tracemalloc.start()
    try:
        assert journal.life("night", 1).last_step == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


def test_the_last_number_counts_whether_that_life_has_ended_or_not(journal: Journal) -> None:
    assert journal.last_generation("night") == 0
    for run, generation in (("night", 1), ("night", 2), ("day", 7)):
        journal.open_generation(run, generation, 1, 1.0, "t", "b", None, None, 1.0)
    journal.close_generation("night", 1, {})
    assert journal.last_generation("night") == 2
    journal.close_generation("night", 2, {})
    assert journal.last_generation("night") == 2


def test_only_the_owner_may_read_it(journal: Journal) -> None:
    add_event(journal, 1)
    journal.flush()
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
from mlx_supervisor.journal.journal import Journal
journal = Journal(Path(sys.argv[1]), print)
number = 0
while True:
    number += 1
    for _ in range(50):
        journal.event("night", 1, "note", "info", "text " * 20, {"number": number}, 1.0)
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
            acknowledged = int((writer.stdout.read().split() or [acknowledged])[-1])
        told: list[str] = []
        journal = Journal(path, told.append)
        history = journal.load_history("night")
        assert history is not None
        assert history["number"] >= acknowledged
        assert max(event["fields"]["number"] for event in journal.events("night")) >= acknowledged
        assert told == []
        journal.close()


def test_a_full_queue_drops_counts_and_never_waits(tmp_path: Path, told: list[str]) -> None:
    journal = Journal(tmp_path / "journal.db", told.append, queue_limit=100)
    blocked = sqlite3.connect(journal.path, isolation_level=None)
    blocked.execute("BEGIN IMMEDIATE")  # the writer cannot commit
    began = time.monotonic()
    for number in range(1000):
        add_event(journal, number)
    assert time.monotonic() - began < 2.0
    assert journal.dropped >= 800
    blocked.execute("ROLLBACK")
    journal.flush()
    kept = journal.events("night")
    assert len(kept) + journal.dropped == 1000
    assert len(kept) >= 100
    journal.close()


def test_after_closing_nothing_is_kept_silently(journal: Journal) -> None:
    journal.close()
    journal.close()
    add_event(journal, 1)
    assert journal.dropped == 1
    with pytest.raises(JournalError, match="closed"):
        journal.save_history("night", {})


def test_retention_keeps_the_newest_of_each_run(tmp_path: Path, told: list[str]) -> None:
    retention = Retention(events=20, steps=10, samples=5, generations=4)
    journal = Journal(tmp_path / "journal.db", told.append, retention)
    add_event(journal, 7, "day")
    for number in range(100):
        add_event(journal, number)
        add_step(journal, number)
        journal.sample("night", 1, number, 1, 1, 1.0)
        if number < 12:
            journal.open_generation("night", number, 1, 1.0, "t", "b", None, None, 1.0)
            journal.close_generation("night", number, {"n": number})
    journal.flush()
    assert [event["fields"]["number"] for event in journal.events("night")][-20:] == list(range(80, 100))
    assert len(journal.events("night")) <= 22
    assert [step["step"] for step in journal.steps("night")][-10:] == list(range(90, 100))
    assert len(journal.steps("night")) <= 11
    assert [sample["footprint_bytes"] for sample in journal.samples("night")] == list(range(95, 100))
    assert [one["n"] for one in journal.generations("night")] == [8, 9, 10, 11]
    assert len(journal.events("day")) == 1
    journal.close()


def test_a_supervisor_that_restarts_often_still_trims(tmp_path: Path, told: list[str]) -> None:
    for number in range(30):
        journal = Journal(tmp_path / "journal.db", told.append, Retention(events=20))
        add_event(journal, number)
        journal.close()
    journal = Journal(tmp_path / "journal.db", told.append)
    assert len(journal.events("night")) <= 21
    journal.close()


def test_runs_of_long_ago_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RUNS_KEPT", 3)
    journal = Journal(tmp_path / "journal.db", print)
    for number in range(5):
        journal.open_generation(f"run{number}", 1, 1, 1.0, "t", "b", None, None, float(number))
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
def test_a_damaged_file_is_moved_aside_and_said(tmp_path: Path, told: list[str], where: float) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path, told.append)
    for number in range(2000):
        add_event(journal, number)
    journal.save_history("night", {"old": True})
    journal.close()
    scribble(path, where)
    again = Journal(path, told.append)
    assert again.load_history("night") is None
    again.save_history("night", {"new": True})
    assert again.load_history("night") == {"new": True}
    again.close()
    assert (tmp_path / "journal.db.damaged-1").exists()
    assert len(told) == 1
    assert "damaged-1" in told[0]
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_copies_are_bounded_and_the_newest_stay(tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "journal.db"
    for number in range(12):
        path.write_bytes(b"not a database, try %d " % number * 100)
        Journal(path, told.append).close()
    left = sorted(one.name for one in tmp_path.glob("journal.db.damaged-*"))
    assert left == ["journal.db.damaged-10", "journal.db.damaged-11", "journal.db.damaged-12"]
    assert len(told) == 12


def test_a_file_damaged_while_open_is_replaced_and_the_run_goes_on(journal: Journal, told: list[str]) -> None:
    for number in range(3000):
        add_event(journal, number)
    journal.flush()
    shut = sqlite3.connect(journal.path)
    shut.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shut.close()
    with journal.path.open("r+b") as file:
        file.write(b"\xa5" * journal.path.stat().st_size)
    # a new page cache is what any growth of the file would bring
    journal._writer._connection.execute("PRAGMA shrink_memory")
    journal.save_history("night", {"after": 1})
    assert journal.load_history("night") == {"after": 1}
    assert any("damaged-1" in text for text in told)
    assert (journal.path.parent / "journal.db.damaged-1").exists()


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
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


def test_somebody_elses_database_is_not_written_into(tmp_path: Path, told: list[str]) -> None:
    path = tmp_path / "journal.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    Journal(path, told.append).close()
    with sqlite3.connect(tmp_path / "journal.db.damaged-1") as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["photos"]
    other.close()


def test_rows_that_cannot_be_stored_are_counted_and_the_others_kept(journal: Journal) -> None:
    add_step(journal, 1, float("nan"))
    add_step(journal, 2**70)
    journal.event("night", 1, "note", "info", "\ud800 half a character", {"bad": object(), "nan": float("nan")}, 1.0)
    journal.event("night", 1, "note", "info", "long " * 10_000, {"long": "x" * 100_000}, 1.0)
    assert [(step["step"], step["loss"]) for step in journal.steps("night")] == [(1, None)]
    assert journal.dropped == 1
    first, second = journal.events("night")
    assert first["text"] == "? half a character"
    assert len(second["text"]) == 4096
    assert second["fields"] == {"truncated": True}


def test_a_history_that_is_not_plain_data_is_refused(journal: Journal) -> None:
    with pytest.raises(JournalError, match="not plain data"):
        journal.save_history("night", {"set": {1, 2}})
    assert journal.load_history("night") is None


def test_an_unreadable_history_is_said_and_the_run_begins_without(journal: Journal, told: list[str]) -> None:
    journal.save_history("night", {})
    with sqlite3.connect(journal.path) as editor:
        editor.execute("UPDATE runs SET history = '{oops'")
    editor.close()
    assert journal.load_history("night") is None
    assert "history of night" in told[0]


def test_a_full_disk_raises_only_where_durability_was_promised(
    journal: Journal, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "RETRY_INTERVAL_S", 0.05)
    journal.save_history("night", {"before": 1})
    pages = journal._writer.select("PRAGMA page_count", ())[0]["page_count"]
    journal._writer.select(f"PRAGMA max_page_count = {pages}", ())
    for number in range(2000):
        journal.event("night", 1, "note", "info", "x" * 1000, {}, float(number))
    with pytest.raises(JournalError, match="full"):
        journal.save_history("night", {"big": "x" * 100_000})
    assert journal.load_history("night") == {"before": 1}
    assert journal.failures > 0
    assert any("full" in text for text in told)
    assert len(told) <= 2
    journal._writer.select("PRAGMA max_page_count = 1000000", ())  # room again: what was queued is not lost
    until(lambda: any("can be written again" in text for text in told))
    assert len(journal.events("night", 5000)) == 2000
    journal.save_history("night", {"after": 1})
    assert journal.load_history("night") == {"after": 1}


LIMITED = """
import resource, sys
from pathlib import Path
from mlx_supervisor.journal.journal import Journal, JournalError
told = []
journal = Journal(Path(sys.argv[1]), told.append)
journal.save_history("night", {"before": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
refused = 0
for number in range(300):
    journal.event("night", 1, "note", "info", "x" * 4000, {}, 1.0)
    try:
        journal.save_history("night", {"number": number})
        last = number
    except JournalError:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.save_history("night", {"number": "after"})
journal.close()
print(refused, last, len(told), journal.failures)
"""


def test_a_file_size_limit_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, _, told, failures = map(int, done.stdout.split())
    assert refused > 0
    assert told <= 2
    assert failures >= refused
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
    assert [len(journal.events(f"run{n}")) for n in range(4)] == [50] * 4
