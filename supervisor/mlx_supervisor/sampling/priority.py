"""Scheduling: the supervisor's threads run ahead of what they watch, and its sampling thread ahead of all others.

A kill at the limit is late as long as the sampling thread waits for a core, or for a lock of the interpreter whose
holder waits for one. What is not permitted, or not known to this system, is left out.
"""

import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

SWITCH_INTERVAL_S = 0.0005
"""A thread that computes hands the interpreter over to a waiting one after this time (Python's default: 5 ms)."""
SLICE_NS = 100_000
"""Linux 6.12 and later: a thread with a shorter slice than the running one's (3 ms) preempts it when it wakes."""
NICE = -10
"""Of the supervisor's threads, where the system permits it, unless it was started with `nice`."""
WORKER_NICE = 1
"""Added to the supervisor's own value for workers: enough for the scheduler to prefer the supervisor."""
STARTED_NICE = os.getpriority(os.PRIO_PROCESS, 0)
"""What the supervisor was started with."""
QOS_CLASS_USER_INTERACTIVE = 0x21
"""macOS, sys/qos.h: the highest quality of service of a thread."""
SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
SCHED_ATTR_BYTES = 48
SCHED_FLAG_RESET_ON_FORK = 1


def prefer_this_thread() -> None:
    """Called in the sampling thread: ahead of all others."""
    sys.setswitchinterval(min(SWITCH_INTERVAL_S, sys.getswitchinterval()))
    if sys.platform == "darwin":
        _raise_quality_of_service()
    elif not _make_realtime():
        _prefer(threading.get_native_id())


class Threads:
    """Raises the process's threads once each, as they appear: any of them may hold the interpreter's lock."""

    def __init__(self) -> None:
        self._raised = {threading.get_native_id()}

    def refresh(self) -> None:
        """Raise the threads that were started since the last call. Takes about 20 µs when there are none."""
        with suppress(OSError):  # macOS has no such folder, and no such call for another thread
            found = {int(each.name) for each in Path("/proc/self/task").iterdir()}
            for thread in found - self._raised:
                _prefer(thread)
            self._raised = found


def yield_to_supervisor(pid: int) -> None:
    """Make a worker that was just started, and what it will start, a little nicer than this process."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, min(STARTED_NICE + WORKER_NICE, 19))


def _make_realtime() -> bool:
    """Linux, with CAP_SYS_NICE or a limit `rtprio`. The sampler sleeps at least half of the time."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        return False
    return True


def _prefer(thread: int) -> None:
    """Linux: a better nice value, and a short slice. Children do not inherit either."""
    number = SYS_SCHED_SETATTR.get(os.uname().machine)
    wanted = STARTED_NICE if STARTED_NICE > 0 else min(NICE, STARTED_NICE)
    if number is not None and not _set_attributes(number, thread, wanted):
        _set_attributes(number, thread, STARTED_NICE)


def _set_attributes(number: int, thread: int, nice: int) -> bool:
    """sched_setattr(2), for which the C library has no function before glibc 2.41."""
    import struct

    policy, priority, deadline_ns, period_ns = 0, 0, 0, 0
    attributes = struct.pack(
        "<IIQiIQQQ",
        *(SCHED_ATTR_BYTES, policy, SCHED_FLAG_RESET_ON_FORK, nice),
        *(priority, SLICE_NS, deadline_ns, period_ns),
    )
    return bool(_libc().syscall(number, thread, attributes, 0) == 0)


def _raise_quality_of_service() -> None:
    with suppress(OSError, AttributeError):
        _libc().pthread_set_qos_class_self_np(QOS_CLASS_USER_INTERACTIVE, 0)


@cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)
