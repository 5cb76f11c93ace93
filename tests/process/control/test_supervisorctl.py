"""The supervisor's `supervisorctl`: output and exit statuses of Supervisord's client, training progress, errors."""

import importlib
import json
import re
import signal
import subprocess
import sys
import tomllib

import pytest
from tests.process.conftest import REPOSITORY

from mlx_supervisor import __version__
from mlx_supervisor.control.backend import ConfigChanges, Fault, FaultCode, ProcessState, RunInfo

GIB = 1024**3


def test_status_without_arguments_shows_the_progress_of_training(ctl, backend):
    backend.infos["night"] = RunInfo(
        step=120,
        target_steps=1000,
        eta_s=130.0,
        loss=2.3456789,
        batch_size=8,
        accumulation=2,
        gradient_checkpointing=True,
        footprint_bytes=5 * GIB + GIB // 2,
        limit_bytes=12 * GIB,
        leak="leaking",
        leak_bytes_per_step=0.8 * 1024**2,
        steps_to_limit=1200.4,
        seconds_to_limit=130.0,
        trips=1,
        breaker="half-open",
        phase="train",
    )
    ran = ctl()
    assert ran.words[0] == ["idle", "STOPPED", "Not", "started"]
    assert re.sub(r"about \d\d:\d\d,", "about 20:49,", ran.out.splitlines()[1]).endswith(
        "  step 120/1000, 2 min left, done about 20:49, loss 2.346, batch 8×2, gradient checkpointing, "
        "memory 5.5 GiB of 12.0 GiB, leak 0.8 MiB/step, limit in 1,200 steps (2m10s), 1 trip, breaker half-open"
    )
    assert ran.code == 3
    assert ctl("status", "night").code == 0


def test_status_of_a_run_that_has_not_reported_yet(ctl, backend):
    backend.infos["night"] = RunInfo(phase="load", loss=float("nan"), step=None)
    assert ctl("status", "night").out.rstrip("\n").endswith("  (load), loss nan")
    backend.infos["night"] = RunInfo(leak="", leak_bytes_per_step=9e6, steps_to_limit=9.0, phase="running")
    assert len(ctl("status", "night").words[0]) == 6, "growth that is not called a leak is not shown as one"
    backend.infos["night"] = RunInfo(leak="leaking", leak_bytes_per_step=50.2 * 1024**2, steps_to_limit=1.2)
    assert ctl("status", "night").out.endswith("  leak 50.2 MiB/step, limit in 1 step\n")
    backend.infos["night"] = RunInfo(leak="leaking")
    assert ctl("status", "night").out.endswith("  leak\n"), "its rate may not be known yet"
    backend.infos.clear()
    assert len(ctl("status", "night").out.splitlines()) == 1


def test_status_of_unknown_runs_exits_4_and_still_shows_the_others(ctl):
    ran = ctl("status", "nix", "idle")
    assert ran.words[0][:2] == ["idle", "STOPPED"]
    assert ran.out.splitlines()[1] == "nix: ERROR (no such run)"
    assert ran.code == 4


def test_start_stop_restart(ctl, backend):
    assert ctl("start", "idle").out == "idle: started\n"
    ran = ctl("start", "idle", "nix")
    assert (ran.out, ran.code) == ("idle: ERROR (already started)\nnix: ERROR (no such run)\n", 1)
    assert ctl("start", "idle").code == 0
    assert ctl("stop", "all").out == "idle: stopped\nnight: stopped\n"
    ran = ctl("stop", "night")
    assert (ran.out, ran.code) == ("night: ERROR (not running)\n", 0)
    backend.calls.clear()
    assert ctl("restart", "night").out == "night: restarted\n"
    assert backend.calls[0] == ("restart", "night"), "one call, so that an interrupted client leaves nothing stopped"


def test_a_failed_start_gives_the_reason_and_exits_7(ctl, backend):
    backend.start_fails["idle"] = Fault(FaultCode.ABNORMAL_TERMINATION, "out of memory at batch 1")
    ran = ctl("start", "idle")
    assert (ran.out, ran.code) == ("idle: ERROR (out of memory at batch 1)\n", 7)


def test_tail(ctl, folder):
    (folder / "night-stdout.log").write_text("x" * 3000 + "the end\n")
    (folder / "night-stderr.log").write_text("a warning\n")
    assert ctl("tail", "-8", "night").out == "the end\n\n"
    assert len(ctl("tail", "night").out) == 1601
    assert ctl("tail", "night", "stderr").out == "a warning\n\n"
    ran = ctl("tail", "idle")
    assert (ran.code, "idle: ERROR (no such file)" in ran.err) == (1, True)
    ran = ctl("tail", "-f", "nix")
    assert (ran.code, "BAD_NAME: nix" in ran.err) == (1, True)
    assert ctl("tail").code == ctl("tail", "night", "stdin").code == 2


def test_tail_f_until_interrupted(ctl_command, folder, in_background):
    log = folder / "night-stdout.log"
    log.write_text("before\n")
    with in_background([*ctl_command, "tail", "-f", "night"]) as client:
        assert client.stdout.readline() == "before\n"
        with log.open("a") as file:
            file.write("after\n")
        assert client.stdout.readline() == "after\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(10) == 0


def test_a_closed_pipe_causes_no_traceback(ctl_command, backend):
    for number in range(3000):
        backend.put(f"run-with-a-long-name-{number}", ProcessState.FATAL, detail="because of something long" * 3)
    line = " ".join([*ctl_command, "status"])
    ran = subprocess.run(["bash", "-c", f"{line} | head -1"], capture_output=True, text=True, timeout=20, check=False)
    assert ran.stderr == ""


def test_the_other_commands(ctl, backend, folder):
    (folder / "supervisor.log").write_text("the supervisor speaks\n")
    backend.available = ["new"]
    assert ctl("version").out == f"{__version__}\n"
    assert int(ctl("pid").out) > 1
    assert [ctl("pid", name).code for name in ("night", "idle", "nix")] == [0, 7, 1]
    assert ctl("maintail", "-7").out == "speaks\n\n"
    assert [words[:2] for words in ctl("avail").words] == [["idle", "in"], ["new", "avail"], ["night", "in"]]
    assert ctl("signal", "USR1", "night").out == "night: signalled\n"
    assert ctl("signal", "NIX", "night").out == "night: ERROR (bad signal name)\n"
    assert ctl("clear", "night", "nix").code == 1
    assert ctl("add", "new").out == "new: added\n"
    assert ctl("remove", "new").out == "new: removed\n"
    assert ctl("remove", "night").out == "night: ERROR (still running)\n"
    assert ctl("shutdown").code == 0
    assert ("signal", "night", signal.SIGUSR1) in backend.calls
    assert backend.calls[-1] == ("shutdown", False)
    ran = ctl("reread")
    assert (ran.code, ran.err) == (1, "ERROR (the supervisor is shutting down)\n")


def test_info_prints_json_with_sizes_over_32_bits_as_integers(ctl, backend):
    backend.infos["night"] = RunInfo(footprint_bytes=20 * GIB, loss=float("inf"), reason="ok\x00", step=None)
    info = json.loads(ctl("info", "night").out)
    assert info == {
        "name": "night",
        "statename": "RUNNING",
        "footprint_bytes": 20 * GIB,
        "loss": "inf",
        "reason": "ok",
    }
    assert len(ctl("info").out.splitlines()) == 2


def test_update_applies_what_changed(ctl, backend):
    backend.changes = ConfigChanges(added=["new"], changed=["night"], removed=["idle"])
    assert ctl("reread").out == "idle: disappeared\nnew: available\nnight: changed\n"
    assert ctl("update", "nix").code == 1
    ran = ctl("update")
    stopped = "night: stopped for the update and not started again; `start night` resumes it\n"
    assert (ran.out, ran.code) == (f"idle: removed\nnight: updated\n{stopped}new: added\n", 0)
    assert sorted(backend.runs) == ["new", "night"]
    backend.reread_error = "run.toml: runs.x.seed: found -1, allowed are 0 and more"
    assert ctl("reread").err == f"ERROR ({backend.reread_error})\n"


def test_without_a_daemon_the_error_names_the_socket_and_how_to_start_one(folder, client):
    settings = folder / "run.toml"
    settings.write_text(
        'state_dir = "state"\n[runs.night]\nsteps = 1\n[runs.night.task]\nkind = "python"\nentry = "a:b"\n'
    )
    ran = client("-c", str(settings), "start", "night")
    assert f"no supervisor answers at {folder}/state/supervisor.sock" in ran.err
    assert "mlx-supervisor serve" in ran.err
    assert ran.code == 7
    assert client("-s", f"unix://{folder}/nix.sock", "status").code == 4
    bare = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "xdg")}
    assert f"{folder}/xdg" in client("status", **bare, MLX_SUPERVISOR_STATE_DIR="").err or sys.platform == "darwin"
    assert str(folder / "supervisor.sock") in client("status", **bare, MLX_SUPERVISOR_STATE_DIR=str(folder)).err
    default = folder / ".config" / "mlx-supervisor" / "settings.toml"
    default.parent.mkdir(parents=True)
    settings.rename(default)
    assert f"{default.parent}/state/supervisor.sock" in client("status", **bare).err


def test_wrong_options_exit_2_and_name_what_is_allowed(folder, client):
    ran = client("-s", "http://localhost:9001", "status")
    assert (ran.code, "unix:///PATH" in ran.err) == (2, True)
    settings = folder / "run.toml"
    settings.write_text("[runs.night]\nsteps = -1\n")
    ran = client("-c", str(settings), "status")
    assert (ran.code, "runs.night.steps" in ran.err) == (2, True)
    ran = client("-c", str(folder / "nix.toml"), "status")
    assert (ran.code, "nix.toml" in ran.err) == (2, True)
    assert client("start").code == client("dance").code == client("help", "dance").code == 2
    assert "BYTES" in client("help", "tail").out


def test_a_daemon_that_shuts_down_during_a_call_is_reported(ctl_command, served, backend, in_background):
    backend.hold_forever()
    with in_background([*ctl_command, "start", "idle"]) as client:
        backend.wait_for(("start", "idle"))
        served.on_loop(served.server.close())
        out, _ = client.communicate(timeout=10)
    assert out == "idle: ERROR (the supervisor has shut down)\n"
    assert client.returncode == 1


@pytest.mark.parametrize("module", ["mlx_supervisor.cli.ctl.main"])
def test_the_client_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted({{'rich', 'typer', 'msgspec', 'zmq', 'asyncio'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout == "[]\n"


def test_every_installed_command_exists():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for entry in project["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
