"""The supervisor's death, seen as end of file on a pipe: checkpoint and exit, with every process that was started."""

import atexit
import contextlib
import os
import signal
import threading
import time

import psutil

from mlx_supervisor import wire
from mlx_worker.supervision.stop import StopFlag, leave_signals_to_the_main_thread

GRACE_SLICES = 50


def watch_supervisor(stop: StopFlag, grace_s: float) -> None:
    """Wait, in a thread, for end of file on the lifeline: then request a stop, and after `grace_s` kill the group.

    Does nothing when the environment names no lifeline. Raises RuntimeError when the lifeline is not an open file.
    """
    number = os.environ.pop(wire.LIFELINE_VARIABLE, None)  # a descendant must not mistake another file for it
    if number is None:
        return
    try:
        descriptor = int(number)
        os.set_inheritable(descriptor, False)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{wire.LIFELINE_VARIABLE}: expected an open file, found {number!r:.40}: {error}") from None
    broken, stop.supervised = threading.Event(), True
    atexit.register(_end_at_exit, broken)  # before any handler of the user's, so that it is called after them
    threading.Thread(target=_watch, args=(descriptor, stop, grace_s, broken), name="lifeline", daemon=True).start()


def _end_at_exit(broken: threading.Event) -> None:
    """With the supervisor dead, nothing else would end what this worker has started."""
    if broken.is_set():
        end_started()


def _watch(descriptor: int, stop: StopFlag, grace_s: float, broken: threading.Event) -> None:
    leave_signals_to_the_main_thread()
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass
    broken.set()
    stop.supervised, stop.orphaned = False, True
    stop.request("the supervisor died")
    for _ in range(GRACE_SLICES):  # a pause of the machine ends at most one slice early
        time.sleep(grace_s / GRACE_SLICES)
    end_group()


def end_group() -> None:
    """SIGKILL to everything that this worker has started, and to itself."""
    end_started()
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def end_started() -> None:
    """SIGKILL to every other process of the own group, and to those in other sessions with the worker's token."""
    token, own = os.environ.get(wire.TOKEN_VARIABLE, ""), os.getpid()
    leads = os.getpgid(0) == own
    for process in psutil.process_iter():
        # macOS: environ may raise SystemError, and a restricted program's environment is hidden
        with contextlib.suppress(psutil.Error, OSError, SystemError):
            if process.pid == own or process.uids().real != os.getuid():
                continue
            in_group = leads and os.getpgid(process.pid) == own
            if in_group or (token and process.environ().get(wire.TOKEN_VARIABLE) == token):
                process.kill()
