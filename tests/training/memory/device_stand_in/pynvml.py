"""A stand-in for nvidia-ml-py: the driver of a device whose state is in a file. `FAKE_DEVICE` names the file."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

STATE = Path(os.environ["FAKE_DEVICE"])


class NVMLError(Exception):
    pass


def state():
    return json.loads(STATE.read_text())


def nvmlInit():
    if state().get("broken"):
        raise NVMLError("Driver Not Loaded")


def nvmlDeviceGetHandleByUUID(uuid):
    assert uuid == state()["uuid"]
    return uuid


def nvmlDeviceGetMemoryInfo(_):
    now = state()
    return SimpleNamespace(total=now["total"], free=now["total"] - now["others"] - held(now))


def nvmlDeviceGetComputeRunningProcesses(_):
    now = state()
    processes = [SimpleNamespace(pid=1, usedGpuMemory=now["others"])]
    if alive(now):
        processes.append(SimpleNamespace(pid=now["pid"], usedGpuMemory=held(now)))
    return processes


def nvmlDeviceGetGraphicsRunningProcesses(_):
    raise NVMLError("Not Supported")


def held(now):
    return now["used"] if alive(now) else 0


def alive(now):
    try:
        return now["pid"] != 0 and Path(f"/proc/{now['pid']}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
