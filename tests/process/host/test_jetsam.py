"""macOS' reports of its kills for memory, from files constructed in the documented layout."""

import asyncio
import json
import os
import signal
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from mlx_supervisor.host import jetsam
from mlx_supervisor.process import child

PID = 53213
START_S = 1_790_682_201.0


def stamp(wall_s: float, hours_east: float = -7) -> str:
    """As macOS writes it: local time, hundredths, offset."""
    moment = datetime.fromtimestamp(wall_s, timezone(timedelta(hours=hours_east)))
    return f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 10_000:02d} {moment:%z}"


def process(pid: int, name: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": "81f979f9-c7ee-3fbb-9ff8-e26ac5e68a9d",
        "states": ["daemon", "idle"],
        "age": 79372329207,
        "purgeable": 0,
        "fds": 25,
        "coalition": 116,
        "rpages": 127,
        "priority": 0,
        "physicalPages": {"internal": [67, 45]},
        "pid": pid,
        "cpuTime": 0.034783,
        "name": name,
        "lifetimeMax": 132,
        **more,
    }


def report(
    folder: Path, at_s: float = START_S + 60, name: str = "JetsamEvent-2026-09-29-104421.ips", **victim: Any
) -> Path:
    """A report of one kill; `victim` has the other fields of its entry."""
    entry: dict[str, Any] = {"pid": PID, "reason": "vm-compressor-space-shortage", "killDelta": 38175} | victim
    header = {"bug_type": "298", "timestamp": stamp(at_s), "os_version": "macOS 26.6 (25G72)", "incident_id": "E9D6"}
    body = {
        "build": "macOS 26.6 (25G72)",
        "product": "Mac17,3",
        "date": stamp(at_s),
        "memoryStatus": {"pageSize": 16384, "memoryPages": {"free": 940, "active": 133350}},
        "largestProcess": "Python",
        "processes": [
            process(86, "OTACrashCopier"),
            process(name="Python", rpages=1_572_864, **entry),
        ],
    }
    path = folder / name
    path.write_text(json.dumps(header) + "\n" + json.dumps(body, indent=2))
    os.utime(path, (at_s, at_s))
    return path


def test_a_report_that_names_the_worker(tmp_path: Path) -> None:
    report(tmp_path)
    assert jetsam.killed(PID, START_S, tmp_path) is True


def test_without_a_folder_the_answer_is_unknown(tmp_path: Path) -> None:
    assert jetsam.killed(PID, START_S, tmp_path / "none") is None


@pytest.mark.parametrize(
    "victim",
    [{"pid": PID + 1}, {"reason": None}, {"reason": "vnode-limit"}, {"reason": "disk-space-shortage"}, {"pid": None}],
)
def test_other_processes_and_other_reasons_do_not_count(tmp_path: Path, victim: dict[str, Any]) -> None:
    report(tmp_path, **victim)
    assert jetsam.killed(PID, START_S, tmp_path) is False


def test_a_process_in_the_list_without_a_reason_was_not_killed(tmp_path: Path) -> None:
    path = report(tmp_path)
    path.write_text(path.read_text().replace('"reason"', '"was"'))
    os.utime(path, (START_S + 60, START_S + 60))
    assert jetsam.killed(PID, START_S, tmp_path) is False


def test_a_report_older_than_the_worker_does_not_count(tmp_path: Path) -> None:
    path = report(tmp_path, at_s=START_S - 60)
    assert jetsam.killed(PID, START_S, tmp_path) is False
    os.utime(path, (START_S + 60, START_S + 60))
    assert jetsam.killed(PID, START_S, tmp_path) is False, "copied later, but written before"


@pytest.mark.parametrize("hours_east", [-11, 0, 5.5, 14])
def test_the_time_is_read_with_its_zone(tmp_path: Path, hours_east: float) -> None:
    path = report(tmp_path)
    path.write_text(path.read_text().replace(stamp(START_S + 60), stamp(START_S + 60, hours_east)))
    assert jetsam.killed(PID, START_S, tmp_path) is True
    assert jetsam.killed(PID, START_S + 120, tmp_path) is False


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"{}\n{}",
        b'{"bug_type":"298"}\n' + b"[" * 200_000,
        b'{"bug_type":"298"}\n{"processes": 3}',
        b'{"bug_type":"298"}\n{"processes": [3]}',
        b'{"bug_type":"298"}\n{"date": "yesterday", "processes": []}',
        b"\xff\xfe\n\xff",
    ],
)
def test_a_valid_report_is_found_among_malformed_ones(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "JetsamEvent-broken.ips").write_bytes(data)
    (tmp_path / "Python-2026.ips").write_bytes(data)
    (tmp_path / "JetsamEvent-gone.ips").symlink_to(tmp_path / "nowhere")
    assert jetsam.killed(PID, START_S, tmp_path) is False
    report(tmp_path)
    assert jetsam.killed(PID, START_S, tmp_path) is True


def test_a_huge_report_is_skipped(tmp_path: Path) -> None:
    path = report(tmp_path)
    with path.open("ab") as file:
        file.write(b" " * jetsam.REPORT_LIMIT_BYTES)
    assert jetsam.killed(PID, START_S, tmp_path) is False


def test_only_the_newest_reports_are_read(tmp_path: Path) -> None:
    report(tmp_path, at_s=START_S + 1)
    for number in range(jetsam.REPORTS_AT_MOST):
        report(tmp_path, at_s=START_S + 10 + number, name=f"JetsamEvent-{number}.ips", pid=1)
    assert jetsam.killed(PID, START_S, tmp_path) is False


def test_a_report_may_be_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jetsam.killed

    def write_after(*args: Any) -> bool | None:
        found = real(*args)
        report(tmp_path)
        return found

    monkeypatch.setattr(jetsam, "killed", write_after)
    assert asyncio.run(jetsam.killed_within(PID, START_S, 30, tmp_path)) is True
    assert asyncio.run(jetsam.killed_within(PID + 1, START_S, 0, tmp_path)) is False


def test_without_a_folder_of_reports_there_is_no_wait(tmp_path: Path) -> None:
    before_s = time.monotonic()
    assert asyncio.run(jetsam.killed_within(PID, START_S, 60, tmp_path / "none")) is None
    assert time.monotonic() - before_s < 30


def ended(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, by_supervisor: bool, counted: bool | None = None
) -> child.ExitStatus:
    """A worker killed `by_supervisor` or externally, on a kernel with this count; a report names it."""
    monkeypatch.setattr(jetsam, "FOLDER", folder)
    monkeypatch.setattr("mlx_supervisor.process.child.OomKills.happened", lambda self: counted)

    async def live() -> child.ExitStatus:
        worker = child.Child.spawn(["sleep", "600"], folder, "a-token", 1, 2)
        report(folder, at_s=time.time(), pid=worker.pid)
        if by_supervisor:
            worker.kill()
        else:
            os.kill(worker.pid, signal.SIGKILL)
        return await worker.wait()

    return asyncio.run(live())


def test_a_worker_that_a_report_names_was_killed_for_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ended(monkeypatch, tmp_path, by_supervisor=False).oom_killed is True


def test_a_kill_by_the_supervisor_or_with_a_kernel_count_needs_no_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ended(monkeypatch, tmp_path, by_supervisor=True).oom_killed is None
    assert ended(monkeypatch, tmp_path, by_supervisor=False, counted=False).oom_killed is False


def test_no_report_proves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child, "JETSAM_WAIT_S", 0.3)
    monkeypatch.setattr(jetsam, "killed", lambda *_: False)
    assert ended(monkeypatch, tmp_path, by_supervisor=False).oom_killed is None
