"""The commands of `supervisorctl`: each calls the daemon, prints the result, and returns an exit status."""

import argparse
import json
import re
import sys
import urllib.parse
import xmlrpc.client
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_supervisor.cli.ctl import status_line
from mlx_supervisor.cli.ctl.client import UNKNOWN_METHOD, DaemonClient

TAIL_BYTES = 1600
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STATUS_STOPPED = 3
EXIT_STATUS_UNKNOWN = 4
EXIT_NOT_RUNNING = 7
EXIT_INTERRUPTED = 130
"""The exit statuses of Supervisord's client, from the init scripts of LSB."""

BAD_NAME, ABNORMAL_TERMINATION, SPAWN_ERROR, ALREADY_STARTED, NOT_RUNNING, SUCCESS = 10, 40, 50, 60, 70, 80
ALREADY_ADDED = 90
STOPPED_STATES = {0, 100, 200, 1000}
_MEANINGS = {
    BAD_NAME: "no such run",
    11: "bad signal name",
    20: "no such file",
    ALREADY_STARTED: "already started",
    NOT_RUNNING: "not running",
    ALREADY_ADDED: "already in use",
    91: "still running",
}


class UsageError(Exception):
    """Wrong arguments; the text says which are allowed."""


def reason(code: int, text: str) -> str:
    """A fault's text for the user: a fixed one for its code, else the daemon's."""
    return _MEANINGS.get(code) or text.partition(": ")[2] or text


def _results(results: list[dict[str, Any]], done: str, harmless: int) -> int:
    """Print the results of a call on several runs. Returns the exit status of the worst."""
    worst = 0
    for result in results:
        code, name = result["status"], result["name"]
        if code == SUCCESS:
            print(f"{name}: {done}")
            continue
        print(f"{name}: ERROR ({reason(code, result['description'])})")
        if code != harmless:
            dead = code in (ABNORMAL_TERMINATION, SPAWN_ERROR, NOT_RUNNING)
            worst = max(worst, EXIT_NOT_RUNNING if dead else EXIT_FAILED)
    return worst


def _each(daemon: DaemonClient, method: str, names: list[str], *arguments: Any) -> list[dict[str, Any]]:
    """One call for each name. Returns the same result structs as a call on several runs."""
    return [_one(name, partial(daemon.call, method, name, *arguments)) for name in names]


def _one(name: str, call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except xmlrpc.client.Fault as fault:
        return {"name": name, "status": fault.faultCode, "description": fault.faultString}
    return {"name": name, "status": SUCCESS, "description": "OK"}


def status(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show state, step, loss, batch, memory and leak of runs, one line each."""
    infos = daemon.call("supervisor.getAllProcessInfo")
    try:
        extras = {extra["name"]: extra for extra in daemon.call("training.getAllRunInfo")}
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != UNKNOWN_METHOD:
            raise
        extras = {}  # a Supervisord
    requested = set(options.names) - {"all"}
    shown = infos if "all" in options.names else [info for info in infos if not requested or info["name"] in requested]
    width = max([status_line.NAME_WIDTH, *(len(info["name"]) + status_line.GAP for info in shown)])
    code = 0
    for info in shown:
        print(status_line.line(info, extras.get(info["name"], {}), width))
        if info["state"] in STOPPED_STATES:
            code = EXIT_STATUS_STOPPED
    for name in sorted(requested - {info["name"] for info in infos}):
        print(f"{name}: ERROR (no such run)")
        code = EXIT_STATUS_UNKNOWN
    return code


def start(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Start runs and wait until they are ready."""
    return _on_runs(daemon, options.names, "start", "started", ALREADY_STARTED)


def stop(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Checkpoint and stop runs, and wait until they have ended."""
    return _on_runs(daemon, options.names, "stop", "stopped", NOT_RUNNING)


def _on_runs(daemon: DaemonClient, names: list[str], verb: str, done: str, harmless: int) -> int:
    if "all" in names:
        return _results(daemon.call(f"supervisor.{verb}AllProcesses", waits=True), done, harmless)
    return _one_by_one(daemon, f"supervisor.{verb}Process", names, done, harmless)


def _one_by_one(daemon: DaemonClient, method: str, names: list[str], done: str, harmless: int = 0) -> int:
    """One call for each name, so that its result is printed at once: a start may take minutes."""
    return max(_results([_one(name, partial(daemon.call, method, name, waits=True))], done, harmless) for name in names)


def restart(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Stop runs, start them again, and wait until they are ready."""
    if "all" in options.names:
        return max(stop(daemon, options), start(daemon, options))
    # one call for both: a client interrupted between two would leave the run stopped
    return _one_by_one(daemon, "training.restartRun", options.names, "restarted")


def pid(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show the process id of the daemon, or of runs."""
    if not options.names:
        print(daemon.call("supervisor.getPID"))
    if "all" in options.names:
        for info in daemon.call("supervisor.getAllProcessInfo"):
            print(info["pid"])
        return 0
    code = 0
    for name in options.names:
        try:
            pid = daemon.call("supervisor.getProcessInfo", name)["pid"]
        except xmlrpc.client.Fault as fault:
            print(f"{name}: ERROR ({reason(fault.faultCode, fault.faultString)})", file=sys.stderr)
            code = EXIT_FAILED
        else:
            print(pid)
            code = code or (0 if pid else EXIT_NOT_RUNNING)
    return code


def tail(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show the end of a run's log; with -f, follow it."""
    words, count = _byte_count(options.words)
    if not 1 <= len(words) <= 2 or (len(words) == 2 and words[1].lower() not in ("stdout", "stderr")):
        raise UsageError("tail [-f] [-BYTES] NAME [stdout|stderr]")
    name, channel = words[0], words[1].lower() if len(words) == 2 else "stdout"
    if options.follow:
        return _follow(daemon, f"/logtail/{urllib.parse.quote(name)}/{channel}")
    method = "supervisor.readProcessStdoutLog" if channel == "stdout" else "supervisor.readProcessStderrLog"
    try:
        print(daemon.call(method, name, -count, 0))
    except xmlrpc.client.Fault as fault:
        print(f"{name}: ERROR ({reason(fault.faultCode, fault.faultString)})", file=sys.stderr)
        return EXIT_FAILED
    return 0


def maintail(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show the end of the daemon's log; with -f, follow it."""
    words, count = _byte_count(options.words)
    if words:
        raise UsageError("maintail [-f] [-BYTES]")
    if options.follow:
        return _follow(daemon, "/mainlogtail")
    print(daemon.call("supervisor.readLog", -count, 0))
    return 0


def _byte_count(words: list[str]) -> tuple[list[str], int]:
    if words and re.fullmatch(r"-[0-9]{1,9}", words[0]):
        return words[1:], int(words[0][1:])
    return words, TAIL_BYTES


def _follow(daemon: DaemonClient, path: str) -> int:
    try:
        for data in daemon.follow(path):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return 0
    print("supervisorctl: the supervisor closed the connection", file=sys.stderr)
    return EXIT_FAILED


def version(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show the daemon's version."""
    print(daemon.call("supervisor.getSupervisorVersion"))
    return 0


def shutdown(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Checkpoint and stop all runs, then the daemon. Does not wait for the end."""
    daemon.call("supervisor.shutdown")
    print("Shutting down: runs checkpoint first")
    return 0


def reload(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Shut the daemon down and start it again. Does not wait for the start."""
    daemon.call("supervisor.restart")
    print("Restarting: runs checkpoint first")
    return 0


def avail(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """List the runs of the settings, in use or not."""
    for info in daemon.call("supervisor.getAllConfigInfo"):
        used, started = "in use" if info["inuse"] else "avail", "auto" if info["autostart"] else "manual"
        print(f"{info['name']:<32} {used:<9} {started:<9}".rstrip())
    return 0


def info(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Show all details of runs, one JSON object per line."""
    if options.names and "all" not in options.names:
        found = [daemon.call("training.getRunInfo", name) for name in options.names]
    else:
        found = daemon.call("training.getAllRunInfo")
    for each in found:
        whole = {key: int(value) if key.endswith("_bytes") else value for key, value in each.items()}
        print(json.dumps(whole, ensure_ascii=False, sort_keys=True))
    return 0


def signal(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Send a signal to the workers of runs."""
    if "all" in options.names:
        return _results(daemon.call("supervisor.signalAllProcesses", options.signal), "signalled", 0)
    return _results(_each(daemon, "supervisor.signalProcess", options.names, options.signal), "signalled", 0)


def clear(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Empty the logs of runs."""
    if "all" in options.names:
        return _results(daemon.call("supervisor.clearAllProcessLogs"), "cleared", 0)
    return _results(_each(daemon, "supervisor.clearProcessLogs", options.names), "cleared", 0)


def reread(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Read the settings again and list the changes, without applying them."""
    added, changed, removed = daemon.call("supervisor.reloadConfig")[0]
    changes = dict.fromkeys(added, "available") | dict.fromkeys(changed, "changed")
    changes |= dict.fromkeys(removed, "disappeared")
    for name in sorted(changes):
        print(f"{name}: {changes[name]}")
    if not changes:
        print("No config updates to processes")
    return 0


def update(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Read the settings again and apply the changes: stops and removes changed runs, then adds them again."""
    added, changed, removed = daemon.call("supervisor.reloadConfig")[0]
    requested = set(options.names) - {"all"}
    if not (added or changed or removed):
        print("No config updates to processes")
    code = 0
    infos = daemon.call("supervisor.getAllProcessInfo")
    known = {info["name"] for info in infos}
    active = {info["name"] for info in infos if info["state"] not in STOPPED_STATES}
    for name in sorted(requested - {*added, *changed, *removed, *known}):
        print(f"{name}: ERROR (no such run)")
        code = EXIT_FAILED
    for name in [*removed, *changed, *added]:
        if not requested or name in requested:
            outcome = _one(name, partial(_update_one, daemon, name, name in added, name in removed))
            word = "added" if name in added else "removed" if name in removed else "updated"
            code = max(code, _results([outcome], word, 0))
            if name in active and name in changed and outcome["status"] == SUCCESS:
                _say_stopped(daemon, name)
    return code


def _say_stopped(daemon: DaemonClient, name: str) -> None:
    """A run that was stopped for the update starts again only with autostart, as in Supervisord."""
    if daemon.call("supervisor.getProcessInfo", name)["state"] in STOPPED_STATES:
        print(f"{name}: stopped for the update and not started again; `start {name}` resumes it")


def _update_one(daemon: DaemonClient, name: str, new: bool, removed: bool) -> None:
    if not new:
        for result in daemon.call("supervisor.stopProcessGroup", name, waits=True):
            if result["status"] != SUCCESS:
                raise xmlrpc.client.Fault(result["status"], result["description"])
        daemon.call("supervisor.removeProcessGroup", name)
    if not removed:
        daemon.call("supervisor.addProcessGroup", name)


def add(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Add runs of the settings as last read."""
    return _results(_each(daemon, "supervisor.addProcessGroup", options.names), "added", ALREADY_ADDED)


def remove(daemon: DaemonClient, options: argparse.Namespace) -> int:
    """Remove stopped runs."""
    return _results(_each(daemon, "supervisor.removeProcessGroup", options.names), "removed", 0)
