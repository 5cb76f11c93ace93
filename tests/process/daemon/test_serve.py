"""The daemon, controlled by Supervisord's client and by `supervisorctl`; ended in every way, and started again."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.process import harness
from tests.process.conftest import SUPERVISORCTL, Ran, run_client

from mlx_supervisor.settings.reader import read_settings


class ServeProcess:
    """`mlx-supervisor serve` in the background of a test."""

    def __init__(self, settings: Path, **variables: str) -> None:
        self.folder = settings.parent
        self.socket = read_settings(settings).state_dir / "supervisor.sock"
        with (self.folder / "serve.txt").open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlx_supervisor", "serve", "-c", str(settings)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=harness.environment() | variables,
                start_new_session=True,
            )

    def ctl(self, *words: str) -> Ran:
        return run_client([*SUPERVISORCTL, "-s", f"unix://{self.socket}", *words])

    def call(self, method: str, *arguments: str | bool) -> object:
        """Call a method of the control interface."""
        link = http.client.HTTPConnection("localhost", timeout=harness.PATIENCE_S)
        link.sock = socket.socket(socket.AF_UNIX)
        link.sock.connect(str(self.socket))
        with closing(link):
            link.request("POST", "/RPC2", xmlrpc.client.dumps(arguments, f"supervisor.{method}"))
            return xmlrpc.client.loads(link.getresponse().read())[0][0]

    def info(self) -> dict[str, Any]:
        answer = json.loads(self.ctl("info", "run").out)
        assert isinstance(answer, dict)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def until_state(self, state: str, run: str = "run") -> None:
        harness.eventually(lambda: f"{state}" in self.ctl("status", run).out, lambda: self.ctl("status", run).out)


@contextmanager
def serving(settings: Path, **variables: str) -> Iterator[ServeProcess]:
    service = ServeProcess(settings, **variables)
    try:
        harness.eventually(lambda: service.ctl("version").code == 0, (settings.parent / "serve.txt").read_text)
        yield service
    finally:
        tokens = harness.tokens_of(service.process.pid)
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()
        for process in harness.carriers(tokens):
            process.kill()


@pytest.fixture
def stock_for(stock_client: list[str]) -> Callable[[ServeProcess], Callable[..., Ran]]:
    """Supervisord's own client, pointed at a real daemon."""

    def point(service: ServeProcess) -> Callable[..., Ran]:
        configuration = service.folder / "stock.conf"
        configuration.write_text(f"[supervisorctl]\nserverurl=unix://{service.socket}\n")
        return lambda *words: run_client([*stock_client, "-c", str(configuration), *words])

    return point


def test_the_stock_client_drives_a_real_run(folder, stock_for) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=1_000_000)
    with serving(settings) as service:
        stock = stock_for(service)
        ran = stock("status")
        assert (ran.words[0][:2], ran.code) == (["run", "STOPPED"], 3)
        assert stock("start", "run").out == "run: started\n"
        ran = stock("status")
        assert re.fullmatch(r"run +RUNNING +pid \d+, uptime 0:00:0\d\n", ran.out)
        assert ran.code == 0
        first = int(stock("pid", "run").out)
        assert psutil.pid_exists(first)
        assert stock("start", "run").out == "run: ERROR (already started)\n"
        harness.eventually(lambda: "step " in stock("tail", "run").out)
        assert "Ready at step 0" in stock("tail", "-4000", "run").out
        ran = stock("restart", "run")
        assert ran.out == "run: stopped\nrun: started\n"
        assert int(stock("pid", "run").out) != first
        assert not psutil.pid_exists(first)
        assert stock("stop", "run").out == "run: stopped\n"
        assert stock("status", "run").code == 3
        assert stock("stop", "run").out == "run: ERROR (not running)\n"
        assert stock("version").out.strip()
        assert stock("shutdown").out == "Shut down\n"
        assert service.process.wait(harness.PATIENCE_S) == 0


def test_tail_f_of_the_stock_client_follows_a_real_run(folder, stock_client, stock_for) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=1_000_000)
    with serving(settings) as service:
        stock = stock_for(service)
        stock("start", "run")
        follower = subprocess.Popen(
            [*stock_client, "-c", str(folder / "stock.conf"), "tail", "-f", "run"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert follower.stdout is not None
            lines = (line for line in follower.stdout if re.search(r"step \d+/1000000", line))
            steps = [int(re.findall(r"step (\d+)/", next(lines))[0]) for _ in range(3)]
            assert steps == sorted(set(steps))
        finally:
            follower.kill()
            follower.wait()


def test_a_failed_start_is_reported_with_its_reason(folder, stock_for) -> None:
    settings = harness.write_settings(folder, args={"mode": "refuse", "at_step": 1, "delay_s": 0.0})
    settings.write_text(
        settings.read_text() + '[runs.broken]\nsteps = 5\n[runs.broken.task]\nkind="python"\nentry="a:b"\n'
    )
    with serving(settings, MLX_SUPERVISOR_WORKER="/nowhere/at/all") as service:
        ran = stock_for(service)("start", "run")
        assert ran.out in ("run: ERROR (spawn error)\n", "run: ERROR (abnormal termination)\n")
        assert ran.code == 7
        service.until_state("FATAL")
        assert "No such file" in service.ctl("status", "run").out


def test_supervisorctl_shows_training_progress(folder) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=1_000_000, batch={"size": 4})
    with serving(settings) as service:
        service.ctl("start", "run")
        harness.eventually(lambda: re.search(r"step \d+/1000000", service.ctl("status").out) is not None)
        assert "loss" in service.ctl("status").out


def test_a_daemon_that_ends_suspends_its_runs_and_the_next_one_resumes_them(folder) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01, "save_every": 10**6}, steps=1_000_000)
    with serving(settings) as service:
        service.ctl("start", "run")
        harness.eventually(lambda: harness.journaled_steps(folder) > 0)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(harness.PATIENCE_S) == 0
    saved = int((folder / "state/runs/run/saved").read_text())
    assert saved > 0
    with serving(settings) as service:
        service.until_state("RUNNING")
        assert f"Ready at step {saved} of" in service.ctl("tail", "-100000", "run").out
        service.ctl("stop", "run")
    with serving(settings) as service:  # a stopped run stays stopped
        assert "STOPPED" in service.ctl("status").out


def test_the_daemon_after_a_killed_one_resumes_its_runs(folder) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01, "save_every": 10**6}, steps=1_000_000)
    with serving(settings) as service:
        service.ctl("start", "run")
        harness.eventually(lambda: harness.journaled_steps(folder) > 0)
        tokens = harness.tokens_of(service.process.pid)
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        harness.eventually(lambda: harness.carriers(tokens) == [])
    saved = int((folder / "state/runs/run/saved").read_text())
    with serving(settings) as service:
        service.until_state("RUNNING")
        assert f"Ready at step {saved} of" in service.ctl("tail", "-100000", "run").out


@pytest.mark.parametrize("wait", [False, True])
def test_an_answered_stop_and_start_outlive_the_daemon(folder, wait) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01, "save_every": 10**6}, steps=1_000_000)
    settings.write_text(settings.read_text().replace("[runs.run]\n", "[runs.run]\nautostart = true\n"))
    with serving(settings) as service:
        harness.eventually(lambda: harness.journaled_steps(folder) > 0)
        workers = harness.carriers(harness.tokens_of(service.process.pid))
        for worker in workers:
            if not wait:
                worker.suspend()  # it does not end before the daemon
        assert service.call("stopProcess", "run", wait)
        service.kill()
        for worker in workers:
            if not wait:
                worker.resume()
    with serving(settings) as service:
        harness.eventually(lambda: service.info()["outcome"] == "stopped", lambda: str(service.info()))
        assert (service.info()["generation"], service.ctl("status", "run").out.split()[1]) == (1, "STOPPED")
        assert service.call("startProcess", "run", wait)
        service.kill()
    settings.write_text(settings.read_text().replace("autostart = true\n", ""))
    with serving(settings) as service:
        service.until_state("RUNNING")


def test_the_daemon_after_a_killed_one_shows_no_error_of_an_earlier_generation(folder) -> None:
    crashes_once = {"mode": "crash", "at_step": 3, "generations": 1, "delay_s": 0.01, "save_every": 10**6}
    settings = harness.write_settings(folder, args=crashes_once, steps=1_000_000)
    with serving(settings) as service:
        service.ctl("start", "run")
        harness.eventually(lambda: harness.journaled_steps(folder) > 10)
        assert "the user's code is broken" in service.ctl("tail", "-100000", "run").out
        service.process.kill()
        service.process.wait()
    with serving(settings, MLX_SUPERVISOR_WORKER="tail -f") as service:  # a worker that is never ready
        service.until_state("STARTING")
        assert json.loads(service.ctl("info", "run").out)["error"] == ""
        assert "broken" not in service.ctl("status", "run").out


def test_autostart_starts_once_and_not_again_when_completed(folder) -> None:
    settings = harness.write_settings(folder, args={}, steps=5)
    settings.write_text(settings.read_text().replace("[runs.run]\n", "[runs.run]\nautostart = true\n"))
    for _ in range(2):
        with serving(settings) as service:
            service.until_state("EXITED")
            log = service.ctl("tail", "-100000", "run").out
            assert log.count("Starting.") == 1


def test_starting_a_completed_run_succeeds_without_a_worker(folder, stock_for) -> None:
    settings = harness.write_settings(folder, args={}, steps=5)
    with serving(settings) as service:
        service.ctl("start", "run")
        service.until_state("EXITED")
        job = folder / "state/runs/run/job.json"
        job.unlink()
        assert service.ctl("start", "run").out == "run: started\n"
        assert stock_for(service)("restart", "run").out == "run: ERROR (not running)\nrun: started\n"
        log = service.ctl("tail", "-100000", "run").out
        assert log.count("Already complete at step 5; nothing was trained.") == 2
        assert not job.exists(), "a worker was started"
        assert "EXITED" in service.ctl("status").out


def test_the_service_manager_is_notified_of_ready_watchdog_and_stopping(folder) -> None:
    settings = harness.write_settings(folder, args={})
    path = folder / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(harness.PATIENCE_S)
        with serving(settings, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="400000") as service:
            received = manager.recv(4096).decode()
            assert "READY=1" in received, "a service manager ignores a watchdog before it"
            while received.count("WATCHDOG=1") < 3:
                received += manager.recv(4096).decode()
            service.process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in manager.recv(4096).decode():
                pass
            assert service.process.wait(harness.PATIENCE_S) == 0


def test_wrong_settings_end_it_with_2(folder) -> None:
    settings = harness.write_settings(folder, args={}, batch={"size": 0})
    done = subprocess.run(
        [sys.executable, "-m", "mlx_supervisor", "serve", "-c", str(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "runs.run.batch.size" in done.stderr
    assert not (folder / "state").exists()


def test_the_daemon_does_not_load_what_would_cost_it_megabytes() -> None:
    heavy = "{'_hashlib', '_ssl', 'bz2', 'lzma', 'mlx', 'numpy', 'rich', 'typer', 'typing_extensions'}"
    code = f"import sys, mlx_supervisor.cli.serve; print(sorted(each for each in {heavy} if sys.modules.get(each)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
