"""The signals that end a run or the daemon."""

import asyncio
import signal
from collections.abc import Callable


def handle_signals(stop: Callable[[str], None], kill: Callable[[str], None]) -> set[signal.Signals]:
    """Call `stop` with a signal's name, `kill` with a reason at a second one of its kind. Returns those received."""
    received: set[signal.Signals] = set()

    def on_signal(number: signal.Signals) -> None:
        if number in received and number is not signal.SIGHUP:  # a closing terminal sends SIGHUP twice, then SIGTERM
            kill(f"second {number.name}")
        else:
            stop(number.name)
        received.add(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup outlives the terminal
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return received
