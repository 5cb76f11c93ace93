"""Closed terminals, unread pipes and badly timed signals must not harm the training."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tests.process import harness
from tests.process.conftest import SUPERVISORCTL
from tests.process.daemon.test_serve import serving


def summary_of(tmp_path: Path) -> dict[str, object]:
    summary = json.loads((tmp_path / "state/runs/run/summary.json").read_text())
    assert isinstance(summary, dict)
    return summary


def test_under_nohup_a_closed_terminal_does_not_end_the_run(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01}, steps=100)
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with harness.Foreground(settings, preexec_fn=ignore) as foreground:
        foreground.until("step ")
        foreground.process.send_signal(signal.SIGHUP)
        assert foreground.wait() == 0
    assert foreground.summary()["step"] == 100


def test_repeated_signals_of_a_closing_terminal_let_the_worker_checkpoint(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.4, "save_every": 10**6}, steps=10**6)
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # the kernel, the shell, the session manager
            foreground.process.send_signal(number)
            foreground.until("A second Ctrl-C")
        assert foreground.wait() == 130
    assert foreground.summary()["generations"][0]["ended"] == "exit code 75"


def test_a_run_can_be_stopped_after_its_terminal_closed(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01}, steps=10**6)
    master, slave = pty.openpty()
    with harness.Foreground(settings, stdout=slave, stderr=slave) as foreground:
        harness.eventually(lambda: (tmp_path / "state/runs/run/saved").exists())
        os.close(slave)
        os.close(master)
        foreground.process.send_signal(signal.SIGHUP)
        assert foreground.wait() == 130
    assert summary_of(tmp_path)["outcome"] == "stopped"


def test_a_reader_that_closes_its_pipe_does_not_end_a_run(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01}, steps=100)
    read_end, write_end = os.pipe()
    with harness.Foreground(settings, stdout=write_end, stderr=write_end) as foreground:
        os.close(write_end)
        assert os.read(read_end, 1)
        os.close(read_end)
        assert foreground.wait() == 0
    assert (summary_of(tmp_path)["outcome"], summary_of(tmp_path)["step"]) == ("completed", 100)


def test_a_slow_reader_blocks_nothing_and_still_gets_the_summary(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    filled = 0
    try:
        while True:
            filled += os.write(write_end, b"x" * 64)
    except BlockingIOError:
        os.set_blocking(write_end, True)
    with harness.Foreground(settings, stdout=write_end) as foreground, os.fdopen(read_end, "rb") as reader:
        os.close(write_end)
        harness.eventually(lambda: (tmp_path / "state/runs/run/summary.json").exists())
        assert foreground.process.poll() is None
        output = reader.read()[filled:]
        assert foreground.wait() == 0
    assert json.loads(output.splitlines()[-1])["outcome"] == "completed"


def test_brackets_in_a_reason_are_shown_as_they_are(tmp_path: Path) -> None:
    says = "[metal::malloc] no [/x] :smile:"
    settings = harness.write_settings(tmp_path, args={"mode": "crash", "at_step": 1, "says": says})
    done = harness.run(settings)
    assert done.process.returncode == 1
    assert says in done.summary()["reason"]
    assert "failed before the first step: RuntimeError: " in done.stderr
    assert "; the same error 2 times in a row" in done.stderr
    assert f"RuntimeError: {says}" in done.stderr.rpartition("failed before")[2]


def test_a_run_completes_with_closed_standard_descriptors(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    command = f"exec {sys.executable} -m mlx_supervisor run {settings} 0<&- >&- 2>&-"
    done = subprocess.run(["/bin/sh", "-c", command], env=harness.environment(), check=False, timeout=60)
    assert done.returncode == 0
    assert summary_of(tmp_path)["outcome"] == "completed"


def test_a_supervisor_that_was_stopped_for_a_while_does_not_report_a_hang(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"delay_s": 0.01}, steps=10**6, restart={"hang_timeout_s": 0.8, "max_without_progress": 1}
    )
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        saved = tmp_path / "state/runs/run/saved"
        harness.eventually(saved.exists)
        foreground.process.send_signal(signal.SIGSTOP)
        came_to = int(saved.read_text() or 0)
        harness.eventually(lambda: int(saved.read_text() or 0) > came_to + 400)  # more than 4 s
        foreground.process.send_signal(signal.SIGCONT)
        steps = harness.journaled_steps(tmp_path)
        harness.eventually(lambda: harness.journaled_steps(tmp_path) > steps + 200)
        harness.interrupt(foreground)
        assert foreground.wait() == 130
    assert "Hang" not in foreground.stderr
    assert "The supervisor did not run for " in foreground.stderr
    assert len(foreground.summary()["generations"]) == 1


def test_ctrl_c_while_a_dead_supervisors_worker_is_waited_for(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"mode": "deaf"}, steps=10**6, restart={"stop_grace_s": 600})
    with harness.Foreground(settings) as first:
        first.until("step ")
        tokens = harness.tokens_of(first.process.pid)
        first.process.kill()
        first.process.wait()
        with harness.Foreground(settings) as second:
            second.until("Checking for a leftover worker")
            harness.interrupt(second)
            second.until("A second Ctrl-C")
            assert len(harness.carriers(tokens)) == 1  # the grace period
            harness.interrupt(second)
            assert second.wait() == 130
            assert harness.carriers(tokens) == []
    assert second.summary()["outcome"] == "stopped"


def _signals_received(folder: Path, times: int) -> bool:
    return len(re.findall("shutting_down|killing_workers", (folder / "serve.txt").read_text())) == times


@pytest.mark.parametrize("again", [False, True])
def test_runs_resume_after_the_daemon_ended_even_by_a_second_signal(folder, again) -> None:
    args = {"delay_s": 0.01} | ({"mode": "deaf"} if again else {})
    settings = harness.write_settings(folder, args=args, steps=10**6, restart={"stop_grace_s": 600})
    with serving(settings) as service:
        service.ctl("start", "run")
        service.process.send_signal(signal.SIGHUP)
        if again:
            # one at a time: the kernel keeps only one pending signal of a kind
            for received in (1, 2):
                harness.eventually(partial(_signals_received, folder, received))
                service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(harness.PATIENCE_S) == 0
    with serving(settings) as service:
        service.until_state("RUNNING")


def test_a_run_being_stopped_stays_stopped_when_the_daemon_ends_meanwhile(folder) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 1.0}, steps=10**6)
    with serving(settings) as service:
        service.ctl("start", "run")
        stopping = subprocess.Popen(
            [*SUPERVISORCTL, "-s", f"unix://{service.socket}", "stop", "run"], stdout=subprocess.DEVNULL
        )
        service.until_state("STOPPING")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(harness.PATIENCE_S) == 0
        stopping.wait()
    with serving(settings) as service:
        assert "STOPPED" in service.ctl("status").out
