"""The supervisor's death, seen as end of file on a pipe: checkpoint and exit."""

import contextlib
import os
import signal
import threading
import time

from mlx_supervisor import wire
from mlx_worker.supervision.stop import StopFlag, leave_signals_to_the_main_thread


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
    threading.Thread(target=_watch, args=(descriptor, stop, grace_s), name="lifeline", daemon=True).start()


def _watch(descriptor: int, stop: StopFlag, grace_s: float) -> None:
    leave_signals_to_the_main_thread()
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass
    stop.request("the supervisor died")
    time.sleep(grace_s)
    end_group()


def end_group() -> None:
    """SIGKILL to the own process group, or to this process alone if it leads no group."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
