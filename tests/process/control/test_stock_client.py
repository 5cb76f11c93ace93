"""Supervisord's `supervisorctl` 4.3.0 with this server: its output and its exit statuses."""

import re
import signal
import time

import pytest

from mlx_supervisor import __version__
from mlx_supervisor.control.backend import ConfigChanges, Fault, FaultCode, ProcessState


def test_status_shows_every_run_and_exits_3_when_one_is_stopped(stock, backend):
    ran = stock("status")
    assert ran.words[0] == ["idle", "STOPPED", "Not", "started"]
    assert re.fullmatch(r"night +RUNNING +pid 123, uptime 0:01:0\d", ran.out.splitlines()[1])
    assert ran.code == 3
    backend.put("idle", ProcessState.RUNNING, pid=5, started_at_s=1.0)
    assert stock("status").code == 0


@pytest.mark.parametrize(
    ("state", "fields", "description"),
    [
        (ProcessState.FATAL, {"detail": "3 restarts without progress"}, "3 restarts without progress"),
        (ProcessState.BACKOFF, {}, 'unknown error (try "tail idle")'),
        (ProcessState.STARTING, {"detail": "loading the model"}, "loading the model"),
        (ProcessState.EXITED, {"started_at_s": 1e9, "stopped_at_s": 1e9}, r"Sep 0\d \d\d:46 [AP]M"),
        (ProcessState.RUNNING, {"pid": 7, "started_at_s": 4e9}, "pid 7, uptime 0:00:00"),
    ],
)
def test_status_describes_each_state_in_supervisords_words(stock, backend, state, fields, description):
    backend.put("idle", state, **fields)
    line = stock("status", "idle").out.rstrip("\n")
    assert re.fullmatch(rf"idle +{state.name} +({re.escape(description)}|{description})", line)


def test_status_of_an_unknown_run_exits_4(stock):
    ran = stock("status", "nix")
    assert (ran.out, ran.code) == ("nix: ERROR (no such process)\n", 4)


def test_start_waits_until_the_run_is_ready(stock, backend):
    ran = stock("start", "idle")
    assert (ran.out, ran.code) == ("idle: started\n", 0)
    assert backend.calls == [("start", "idle"), ("started", "idle")]
    ran = stock("start", "idle", "night")
    assert (ran.out, ran.code) == ("idle: ERROR (already started)\nnight: ERROR (already started)\n", 0)


@pytest.mark.parametrize(
    ("failure", "line", "code"),
    [
        (Fault(FaultCode.SPAWN_ERROR, "no memory"), "spawn error", 7),
        (Fault(FaultCode.ABNORMAL_TERMINATION, "killed"), "abnormal termination", 7),
        (Fault(FaultCode.FAILED, "a fault that its client does not expect here"), "spawn error", 7),
        (RuntimeError("a bug"), "spawn error", 7),
    ],
)
def test_a_start_that_fails_is_never_a_traceback(stock, backend, failure, line, code):
    backend.start_fails["idle"] = failure
    ran = stock("start", "idle")
    assert (ran.out, ran.code) == (f"idle: ERROR ({line})\n", code)
    assert stock("start", "all").out == f"idle: ERROR ({line})\n"


def test_unknown_runs_are_named_in_errors(stock):
    for command, code in (("start", 1), ("stop", 1), ("clear", 1), ("signal HUP", 1)):
        ran = stock(*command.split(), "nix")
        assert (ran.out, ran.code) == ("nix: ERROR (no such process)\n", code)
    assert stock("tail", "nix").out == "nix: ERROR (no such process name)\n"
    assert stock("pid", "nix").out == "No such process nix\n"
    assert stock("tail", "-f", "nix").err.endswith("Cannot read, status code 404\n")


def test_stop_and_restart(stock, backend):
    ran = stock("stop", "night")
    assert (ran.out, ran.code) == ("night: stopped\n", 0)
    ran = stock("stop", "night")
    assert (ran.out, ran.code) == ("night: ERROR (not running)\n", 0)
    ran = stock("restart", "idle")
    assert (ran.out, ran.code) == ("idle: ERROR (not running)\nidle: started\n", 0)
    ran = stock("restart", "idle")
    assert (ran.out, ran.code) == ("idle: stopped\nidle: started\n", 0)


def test_groups_and_all(stock, backend):
    assert stock("start", "idle:*").out == "idle: started\n"
    assert stock("stop", "all").out == "idle: stopped\nnight: stopped\n"
    assert stock("start", "all").out == "idle: started\nnight: started\n"
    assert stock("signal", "HUP", "idle:*").out == "idle: signalled\n"
    assert stock("clear", "all").out == "idle: cleared\nnight: cleared\n"


def test_pid(stock, backend, served):
    assert stock("pid", "night").out == "123\n"
    ran = stock("pid", "idle")
    assert (ran.out, ran.code) == ("0\n", 7)
    assert int(stock("pid").out) > 1


def test_signal(stock, backend):
    assert stock("signal", "USR1", "night").out == "night: signalled\n"
    assert stock("signal", "15", "night").out == "night: signalled\n"
    assert backend.calls == [("signal", "night", signal.SIGUSR1), ("signal", "night", 15)]
    ran = stock("signal", "NIX", "night")
    assert (ran.out, ran.code) == ("night: ERROR (bad signal name)\n", 1)
    assert stock("signal", "HUP", "idle").out == "idle: ERROR (not running)\n"


def test_tail_shows_the_end_without_characters_that_xml_forbids(stock, backend, folder):
    (folder / "night-stdout.log").write_bytes(b"x" * 5000 + "\nlöss \x1b[31m2.5\x1b[0m\x00 ∞\n".encode())
    (folder / "night-stderr.log").write_text("a warning\n")
    assert stock("tail", "night").out.endswith("x\nlöss 2.5 ∞\n\n")
    assert len(stock("tail", "night").out.encode()) <= 1601
    assert stock("tail", "-6", "night").out == " ∞\n\n"
    assert stock("tail", "-4", "night").out == "∞\n\n"
    assert stock("tail", "-3", "night").out == "\n\n", "the incomplete character at the cut is dropped"
    assert stock("tail", "night", "stderr").out == "a warning\n\n"
    ran = stock("tail", "idle")
    assert (ran.out, ran.code) == ("idle: ERROR (no log file)\n", 1)


def test_tail_f_shows_the_log_unchanged(stock_command, backend, folder, in_background):
    log = folder / "night-stdout.log"
    log.write_text("before\n")
    with in_background([*stock_command, "tail", "-f", "night"]) as client:
        assert "Press Ctrl-C" in client.stdout.readline()
        assert client.stdout.readline() == "before\n"
        with log.open("a") as file:
            file.write("∞ \x1b[31mred\n")
        assert client.stdout.readline() == "∞ \x1b[31mred\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(10) == 0


def test_maintail(stock, folder):
    ran = stock("maintail")
    assert (ran.out, ran.code) == ("supervisord: ERROR (no log file)\n", 1)
    (folder / "supervisor.log").write_text("a line of the supervisor\n")
    assert stock("maintail").out == "a line of the supervisor\n\n"


def test_tail_f_ends_when_the_server_does(stock_command, served, folder, in_background):
    (folder / "supervisor.log").write_text("a line of the supervisor\n")
    with in_background([*stock_command, "maintail", "-f"]) as client:
        client.stdout.readline()
        assert client.stdout.readline() == "a line of the supervisor\n"
        began = time.monotonic()
        served.on_loop(served.server.close())
        assert time.monotonic() - began < 5, "a follower must not delay the shutdown"
        client.wait(10)


def test_version_avail_shutdown_reload(stock, backend):
    assert stock("version").out == f"{__version__}\n"
    backend.available = ["new"]
    assert [words[:4] for words in stock("avail").words] == [
        ["idle", "in", "use", "manual"],
        ["new", "avail", "manual", "999:999"],
        ["night", "in", "use", "manual"],
    ]
    assert stock("shutdown").out == "Shut down\n"
    assert backend.calls == [("shutdown", False)]
    assert stock("shutdown").out == "ERROR: already shutting down\n"
    assert stock("reread").out == "ERROR: supervisor shutting down\n"
    assert stock("status").words[0][0] == "idle", "methods that change nothing are still answered"
    assert stock("start", "idle").out == "idle: ERROR (spawn error)\n"
    assert stock("stop", "night").out == "FAILED: the supervisor is shutting down\n"
    backend.shutting_down = False
    assert stock("reload").out == "Restarted supervisord\n"
    assert backend.calls[-1] == ("shutdown", True)


def test_reread_and_update(stock, backend):
    assert stock("reread").out == "No config updates to processes\n"
    backend.changes = ConfigChanges(added=["new"], changed=["night"], removed=["idle"])
    assert stock("reread").out == "idle: disappeared\nnew: available\nnight: changed\n"
    ran = stock("update")
    assert ran.out.splitlines() == [
        "idle: stopped",
        "idle: removed process group",
        "night: stopped",
        "night: updated process group",
        "new: added process group",
    ]
    assert ran.code == 0
    assert sorted(backend.runs) == ["new", "night"]
    backend.reread_error = "run.toml: runs.x.seed: found -1, allowed are 0 and more"
    ran = stock("reread")
    assert (ran.out, ran.code) == (f"ERROR: CANT_REREAD: {backend.reread_error}\n", 1)


def test_add_and_remove(stock, backend):
    assert stock("add", "new", "new").out == "new: added process group\nERROR: process group already active\n"
    assert stock("remove", "night").out == "ERROR: process/group still running: night\n"
    assert stock("remove", "new").out == "new: removed process group\n"
    assert stock("remove", "new").out == "ERROR: no such process/group: new\n"
