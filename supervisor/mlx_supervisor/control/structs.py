"""Runs as Supervisord's structs: every key that its clients read, in the type that they expect."""

import datetime
import time
from typing import Any

from mlx_supervisor.control.backend import CHANNELS, Backend, ConfigInfo, FaultCode, ProcessInfo, ProcessState
from mlx_supervisor.control.xmlrpc_codec import clip_int

PRIORITY = 999
"""Supervisord's default; the supervisor has no start order."""
EXIT_STATUS_LIMIT = 127
"""Exporters treat a larger exit status as a protocol error."""


def process(backend: Backend, info: ProcessInfo, now_s: float) -> dict[str, Any]:
    """The struct that `getProcessInfo` returns. `now_s`: seconds since 1970."""
    stdout, stderr = (str(backend.log_path(info.name, channel) or "") for channel in CHANNELS)
    return {
        "name": info.name,
        "group": info.name,
        "start": clip_int(info.started_at_s),
        "stop": clip_int(info.stopped_at_s),
        "now": clip_int(now_s),
        "state": int(info.state),
        "statename": info.state.name,
        "spawnerr": info.detail if info.state in (ProcessState.FATAL, ProcessState.BACKOFF) else "",
        "exitstatus": _exit_status(info.exit_status),
        "logfile": stdout,
        "stdout_logfile": stdout,
        "stderr_logfile": stderr,
        "pid": clip_int(info.pid),
        "description": description(info, now_s),
    }


def description(info: ProcessInfo, now_s: float) -> str:
    """The last column of `supervisorctl status`. Programs parse that of a RUNNING run."""
    if info.state is ProcessState.RUNNING:
        uptime = datetime.timedelta(seconds=max(0, clip_int(now_s) - clip_int(info.started_at_s)))
        return f"pid {info.pid}, uptime {uptime}"
    if info.state in (ProcessState.FATAL, ProcessState.BACKOFF):
        return info.detail or f'unknown error (try "tail {info.name}")'
    if info.state in (ProcessState.STOPPED, ProcessState.EXITED) and not info.detail:
        if not info.started_at_s:
            return "Completed" if info.state is ProcessState.EXITED else "Not started"  # by an earlier daemon
        return time.strftime("%b %d %I:%M %p", time.localtime(clip_int(info.stopped_at_s)))
    return info.detail


def _exit_status(status: int | None) -> int:
    if status is None:
        return 0
    return -1 if status < 0 else min(status, EXIT_STATUS_LIMIT)


def config(backend: Backend, info: ConfigInfo) -> dict[str, Any]:
    """The struct that `getAllConfigInfo` returns for one run; unused options have Supervisord's default."""
    channels: dict[str, Any] = {}
    for channel in CHANNELS:
        log = backend.log_path(info.name, channel) if info.in_use else None
        channels[f"{channel}_logfile"] = str(log or "none")
        for option in ("logfile_backups", "logfile_maxbytes", "capture_maxbytes"):
            channels[f"{channel}_{option}"] = 0
        channels[f"{channel}_events_enabled"] = channels[f"{channel}_syslog"] = False
    return channels | {
        "name": info.name,
        "group": info.name,
        "inuse": info.in_use,
        "autostart": info.autostart,
        "command": info.command,
        "directory": info.directory or "none",
        "uid": "none",
        "exitcodes": [0],
        "group_prio": PRIORITY,
        "process_prio": PRIORITY,
        "killasgroup": True,
        "redirect_stderr": False,
        "startretries": 0,
        "startsecs": 0,
        "stopsignal": 15,
        "stopwaitsecs": clip_int(info.stop_wait_s),
        "serverurl": "none",
    }


def result(name: str, code: FaultCode = FaultCode.SUCCESS, text: str = "OK") -> dict[str, Any]:
    """One element of the result of a call on a group or on all runs."""
    return {"name": name, "group": name, "status": int(code), "description": text}
