"""The service files: keys from the manuals, the installers, and the daemon's notifications to systemd."""

import os
import plistlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "systemd" / "mlx-supervisor.service"
PLIST = ROOT / "launchd" / "io.github.mlx-supervisor.plist"

# systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5) of systemd 252
UNIT_KEYS = {
    "Unit": {"Description", "Documentation", "After", "Wants", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        *("Type", "NotifyAccess", "ExecStart", "ExecReload", "WatchdogSec", "Restart", "RestartSec"),
        *("RestartPreventExitStatus", "SuccessExitStatus", "TimeoutStartSec", "TimeoutStopSec", "OOMPolicy"),
        *("KillMode", "KillSignal", "SendSIGKILL", "LimitCORE", "LimitNOFILE", "UMask", "Environment", "Nice"),
        *("NoNewPrivileges", "LockPersonality", "RestrictSUIDSGID", "RestrictRealtime", "SystemCallArchitectures"),
    },
    "Install": {"WantedBy", "Also", "Alias"},
}
# They need a user namespace or privileges in a user's unit, hide the GPU, or forbid code made at run time.
BREAKING = {
    *("PrivateDevices", "DevicePolicy", "MemoryDenyWriteExecute", "ProtectSystem", "ProtectHome", "PrivateUsers"),
    *("PrivateTmp", "ProtectProc", "RestrictNamespaces", "CapabilityBoundingSet", "SystemCallFilter", "User"),
    *("LimitAS", "LimitMEMLOCK", "MemoryMax", "TasksMax", "DynamicUser", "IPAddressDeny"),
}
# launchd.plist(5)
PLIST_KEYS = {
    "Label": str,
    "ProgramArguments": list,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ThrottleInterval": int,
    "ProcessType": str,
    "ExitTimeOut": int,
    "EnvironmentVariables": dict,
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "Umask": int,
    "SoftResourceLimits": dict,
}


def parse_unit(text: str) -> dict[str, list[tuple[str, str]]]:
    """Sections with their assignments; raises on any line that is neither of these nor a comment."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for line in text.splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
            continue
        assert current is not None
        key, equals, value = line.partition("=")
        assert equals, line
        current.append((key, value))
    return sections


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def install(script: str, home: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": path or "/usr/local/bin:/usr/bin:/bin"}
    command = ["/bin/bash", str(ROOT / script / "install.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "a place & <more> 100%" / "mlx-supervisor"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_every_key_of_the_unit_is_known_and_none_breaks_a_gpu() -> None:
    sections = parse_unit(UNIT.read_text())
    assert set(sections) == set(UNIT_KEYS)
    for section, assignments in sections.items():
        keys = [key for key, _ in assignments]
        assert set(keys) <= UNIT_KEYS[section], section
        assert len(keys) == len(set(keys)), section
        assert not set(keys) & BREAKING


def test_the_unit_restarts_a_crashed_daemon_and_leaves_time_for_checkpoints() -> None:
    service = dict(parse_unit(UNIT.read_text())["Service"])
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert seconds(service["TimeoutStopSec"]) >= longest_stop_s()
    assert seconds(service["WatchdogSec"]) >= 20


def longest_stop_s() -> float:
    """Stop grace, SIGTERM's grace, and the wait after SIGKILL, at their defaults."""
    from tests.core.policies import DEFAULTS

    policy = DEFAULTS.restart
    return policy.stop_grace_s + policy.term_grace_s + policy.kill_wait_s


def test_every_key_of_the_agent_is_known_and_of_the_right_type() -> None:
    agent = plistlib.loads(PLIST.read_bytes())
    for key, value in agent.items():
        assert type(value) is PLIST_KEYS[key], key
    assert agent["Label"] == PLIST.stem
    assert agent["ProgramArguments"] == ["@PROGRAM@", "serve"]
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ProcessType"] == "Interactive"
    assert agent["ExitTimeOut"] >= longest_stop_s()
    assert agent["Umask"] == 0o077
    assert agent["StandardOutPath"] == agent["StandardErrorPath"] == "/dev/null"
    assert all(part.startswith("/") for part in agent["EnvironmentVariables"]["PATH"].split(":"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_analyze_finds_no_fault_in_the_unit(tmp_path: Path, program: Path) -> None:
    assert install("systemd", tmp_path, "--program", str(program)).returncode == 0
    unit = tmp_path / ".config" / "systemd" / "user" / UNIT.name
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_LOG_TARGET": "console"}
    command = ["systemd-analyze", "verify", "--user", str(unit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_the_unit_is_installed_with_the_program_once_and_removed(tmp_path: Path, program: Path) -> None:
    target = tmp_path / ".config" / "systemd" / "user" / UNIT.name
    first = install("systemd", tmp_path, "--program", str(program))
    assert first.returncode == 0, first.stderr
    assert f"wrote {target}" in first.stdout
    written = dict(parse_unit(target.read_text())["Service"])
    assert written["ExecStart"] == f'"{str(program).replace("%", "%%")}" serve'
    assert "@" not in "".join(written.values())
    again = install("systemd", tmp_path, "--program", str(program))
    assert (again.returncode, "is up to date" in again.stdout) == (0, True)
    assert [path.name for path in target.parent.iterdir()] == [UNIT.name]
    for _ in range(2):
        assert install("systemd", tmp_path, "--uninstall").returncode == 0
        assert not target.exists()


def test_the_agent_is_installed_with_the_program_once_and_removed(tmp_path: Path, program: Path) -> None:
    target = tmp_path / "Library" / "LaunchAgents" / PLIST.name
    first = install("launchd", tmp_path, "--program", str(program))
    assert first.returncode == 0, first.stderr
    assert plistlib.loads(target.read_bytes())["ProgramArguments"] == [str(program), "serve"]
    again = install("launchd", tmp_path, "--program", str(program))
    assert (again.returncode, "is up to date" in again.stdout) == (0, True)
    assert [path.name for path in target.parent.iterdir()] == [PLIST.name]
    for _ in range(2):
        assert install("launchd", tmp_path, "--uninstall").returncode == 0
        assert not target.exists()


LAUNCHCTL = """#!/bin/bash
echo "$@" >> "$HOME/calls"
case $1 in
    print) [ -f "$HOME/loaded" ] ;;
    bootstrap) touch "$HOME/loaded" ;;
    bootout) rm "$HOME/loaded" ;;
esac
"""


def test_a_loaded_agent_is_left_alone_unless_it_changed(tmp_path: Path, program: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "launchctl").write_text(LAUNCHCTL)
    (tools / "launchctl").chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"

    def verbs() -> list[str]:
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [line.split()[0] for line in lines if not line.startswith("print")]

    done = install("launchd", tmp_path, "--program", str(program), path=path)
    assert "settings.toml" in done.stdout
    assert verbs() == []  # nothing to start without settings
    (tmp_path / ".config" / "mlx-supervisor").mkdir(parents=True)
    (tmp_path / ".config" / "mlx-supervisor" / "settings.toml").touch()
    assert install("launchd", tmp_path, "--program", str(program), path=path).returncode == 0
    assert verbs() == ["bootstrap"]
    assert install("launchd", tmp_path, "--program", str(program), path=path).returncode == 0
    assert verbs() == []
    other = program.with_name("other")
    shutil.copy(program, other)
    assert install("launchd", tmp_path, "--program", str(other), path=path).returncode == 0
    assert verbs() == ["bootout", "bootstrap"]
    assert install("launchd", tmp_path, "--uninstall", path=path).returncode == 0
    assert verbs() == ["bootout"]


@pytest.mark.parametrize("script", ["systemd", "launchd"])
def test_a_missing_program_and_a_wrong_argument_are_refused_clearly(script: str, tmp_path: Path) -> None:
    missing = install(script, tmp_path, "--program", str(tmp_path / "none"))
    assert (missing.returncode, f"not an executable file: {tmp_path / 'none'}" in missing.stderr) == (1, True)
    folder = install(script, tmp_path, "--program", str(tmp_path))
    assert (folder.returncode, "not an executable file" in folder.stderr) == (1, True)
    assert install(script, tmp_path, "--programme", "x").returncode == 2
    assert install(script, tmp_path, "--program").returncode == 2
    assert not list(tmp_path.rglob("*.service")) + list(tmp_path.rglob("*.plist"))


def test_a_path_that_systemd_cannot_run_is_refused(tmp_path: Path) -> None:
    program = tmp_path / 'a "quoted" place'
    program.write_text("")
    program.chmod(0o755)
    done = install("systemd", tmp_path, "--program", str(program))
    assert (done.returncode, "systemd can't run" in done.stderr) == (1, True)


def test_the_daemon_notifies_systemd_of_ready_watchdog_and_stopping(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[runs.idle]\nsteps = 1\n[runs.idle.task]\nkind = "python"\nentry = "a.b:c"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(30)
        systemd.bind(str(tmp_path / "n"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "1000000"}
        state = ["--state-dir", str(tmp_path / "s")]
        command = [sys.executable, "-m", "mlx_supervisor", "serve", "-c", str(settings), *state]
        with (tmp_path / "out").open("wb") as out, subprocess.Popen(command, env=environment, stderr=out) as daemon:
            try:
                received = {systemd.recv(512)}
                end = time.monotonic() + 30
                while b"WATCHDOG=1" not in received or b"READY=1" not in received:
                    assert time.monotonic() < end
                    received.add(systemd.recv(512))
                daemon.send_signal(signal.SIGTERM)
                while systemd.recv(512) != b"STOPPING=1":
                    assert time.monotonic() < end
                assert daemon.wait(30) == 0
            finally:
                daemon.kill()
