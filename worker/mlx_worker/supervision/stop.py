"""Stop requests, and the signals that make them."""

import faulthandler
import os
import signal
import threading
from types import FrameType


class StopFlag:
    """Set once, by the first request; the loop reads it between updates.

    `waits`: the last checkpoint may wait for the disk as long as it takes. `supervised`: a supervisor lives.
    `orphaned`: it has died.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.waits = self.supervised = self.orphaned = False

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str, *, waits: bool = False) -> None:
        """The first reason counts. One request without `waits` is enough to end a wait."""
        # Plain attributes without a lock: a signal handler may interrupt any code.
        self.waits = waits and (self.waits or self.reason is None)
        if self.reason is None:
            self.reason = reason or "stop requested"


def install_signals(stop: StopFlag, *, ignore_sigterm: bool = False) -> None:
    """SIGTERM and SIGINT request a stop, a second one exits at once; SIGUSR1 writes every thread's stack to stderr.

    A separate thread counts the signals on the wake-up pipe: Python runs a handler in the main thread only, which may
    be in native code for minutes, or asleep while the signal went to another thread.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.request(signal.Signals(number).name)

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
                stop.request(signal.Signals(number).name)
            if seen > 1:
                os._exit(128 + number)


def leave_signals_to_the_main_thread() -> None:
    """Call first in every other thread, so that signals interrupt system calls in the main thread only."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
