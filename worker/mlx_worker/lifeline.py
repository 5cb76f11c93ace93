"""Who may end this worker: signals, the supervisor's death, and a watchdog for hangs in native code."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from types import FrameType

from mlx_supervisor import wire

_HANG_FLOOR_S = 300.0
"""The least bound without a `hang_timeout_s`, and of the first update in any case: it also compiles."""
_HANG_FACTOR = 50.0
_HANG_MARGIN = 1.5
"""The supervisor looks first; this watchdog is for the case that there is none any more."""


class StopFlag:
    """Set once, by whoever asks first; the loop reads it between updates."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def asked(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        # A plain attribute and no lock: a signal handler may run in the middle of anything.
        if self.reason is None:
            self.reason = reason or "asked to stop"


def install_signals(stop: StopFlag, *, ignore_sigterm: bool = False) -> None:
    """SIGTERM and SIGINT ask for a stop, a second one exits at once; SIGUSR1 writes every thread's stack to stderr.

    A thread of its own counts, told by the wake-up pipe: Python runs a handler in the main thread only,
    which may be in native code for minutes, or asleep while the signal went to another thread.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_count_signals, args=(read_end, stop), name="signals", daemon=True).start()
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore_sigterm else on_signal)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def _count_signals(read_end: int, stop: StopFlag) -> None:
    leave_signals_to_the_main_thread()
    seen = 0
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM):  # the user's code may handle others
                seen += 1
                stop.ask(signal.Signals(number).name)
            if seen > 1:
                os._exit(128 + number)


def leave_signals_to_the_main_thread() -> None:
    """To be called first in every other thread: a system call there must not be interrupted in its place."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def watch_supervisor(stop: StopFlag, grace_s: float) -> None:
    """Wait, in a thread, for end of file on the lifeline: then ask for a stop, and after `grace_s` end the group.

    Does nothing when the environment names no lifeline.
    """
    number = os.environ.pop(wire.LIFELINE_VARIABLE, None)  # a descendant must not take another file for it
    if number is None:
        return
    try:
        descriptor = int(number)
        os.set_inheritable(descriptor, False)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{wire.LIFELINE_VARIABLE}={number!r:.40}: not an open file ({error})") from None
    threading.Thread(target=_watch, args=(descriptor, stop, grace_s), name="lifeline", daemon=True).start()


def _watch(descriptor: int, stop: StopFlag, grace_s: float) -> None:
    leave_signals_to_the_main_thread()
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass
    stop.ask("the supervisor is gone")
    time.sleep(grace_s)
    end_group()


def end_group() -> None:
    """SIGKILL to the own process group, or to this process alone where it does not lead one."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class HangWatchdog:
    """Ends the process, stacks first, when nothing re-arms it in time. A thread in C: it needs no interpreter lock."""

    def __init__(self, hang_timeout_s: float | None) -> None:
        self._given_s = hang_timeout_s
        self._slowest_s = 0.0
        self._armed_at_s = float("-inf")
        self._armed_bound_s = 0.0

    def note_update(self, seconds: float) -> None:
        """An update took so long; the bound follows the slowest."""
        self._slowest_s = max(self._slowest_s, seconds)
        self.arm()

    def arm(self, floor_s: float = 0.0) -> None:
        """Start the time anew. `floor_s`: allow at least that much, for what is no update."""
        bound_s = max(self._bound_s(), floor_s)
        now_s = time.monotonic()
        alike = self._armed_bound_s <= bound_s <= 1.05 * self._armed_bound_s
        if alike and now_s - self._armed_at_s < self._armed_bound_s / 20:
            return  # arming starts a thread: not for every update of a millisecond
        self._armed_at_s, self._armed_bound_s = now_s, bound_s
        faulthandler.dump_traceback_later(bound_s, exit=True, file=2)

    def disarm(self) -> None:
        """No bound from here on."""
        faulthandler.cancel_dump_traceback_later()

    def _bound_s(self) -> float:
        if self._given_s is not None and self._slowest_s > 0:  # the first update also compiles
            return _HANG_MARGIN * self._given_s
        return max(_HANG_FLOOR_S, _HANG_FACTOR * self._slowest_s)
