"""What systemd wants to hear: one datagram to NOTIFY_SOCKET (sd_notify(3)). Without systemd, silence.

Nothing here raises into the daemon: a supervisor's supervisor that does not listen is no reason to stop training.
"""

import os
import socket
from collections.abc import Mapping

STATUS_LIMIT = 512


class Notifier:
    """Reads its environment once. `enabled`: whether somebody listens.

    `watchdog_interval_s`: how often to call `watchdog`, half of what systemd allows; None: systemd does not watch us.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.enabled = self._address is not None
        self.watchdog_interval_s = _watchdog_interval_s(environment) if self.enabled else None
        self.failures = 0
        """Datagrams that could not be sent."""

    def ready(self) -> None:
        """The daemon can be asked."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        line = " ".join(text.split())
        self._send(f"STATUS={line[:STATUS_LIMIT]}")

    def watchdog(self) -> None:
        """Still alive; from the loop that does the work, or it says nothing."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """On the way out."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)) as channel:
                channel.setblocking(False)
                channel.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError:
            self.failures += 1


def _address(value: str) -> str | None:
    """A path, or an abstract name after "@"; anything else is not for us (vsock and the like)."""
    if value.startswith("/"):
        return value
    return "\0" + value[1:] if value.startswith("@") and len(value) > 1 else None


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    """Half of WATCHDOG_USEC, where WATCHDOG_PID is ours or absent (sd_watchdog_enabled(3))."""
    try:
        allowed_us = int(environment.get("WATCHDOG_USEC", "0"))
        pid = environment.get("WATCHDOG_PID", "")
        ours = pid == "" or int(pid) == os.getpid()
    except ValueError:
        return None
    return allowed_us / 2e6 if ours and 0 < allowed_us < 2**63 else None
