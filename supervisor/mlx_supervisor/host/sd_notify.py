"""What systemd wants to hear: one datagram to NOTIFY_SOCKET (sd_notify(3)). Without systemd, silence.

Nothing here raises into the daemon: a supervisor's supervisor that does not listen is no reason to stop training.
"""

import os
import socket

STATUS_LIMIT = 512


def ready() -> bool:
    """The daemon can be asked. Like the others: whether somebody was told."""
    return _send("READY=1")


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return _send(f"STATUS={' '.join(text.split())[:STATUS_LIMIT]}")


def watchdog() -> bool:
    """Still alive; to be said by the loop that does the work, or it says nothing."""
    return _send("WATCHDOG=1")


def stopping() -> bool:
    """On the way out."""
    return _send("STOPPING=1")


def watchdog_interval_s() -> float | None:
    """The longest silence that systemd accepts, in seconds; None: it does not watch us (sd_watchdog_enabled(3)).

    Speak at half of it.
    """
    if _address() is None:
        return None
    try:
        allowed_us = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = os.environ.get("WATCHDOG_PID", "")
        ours = pid == "" or int(pid) == os.getpid()
    except ValueError:
        return None
    return allowed_us / 1e6 if ours and 0 < allowed_us < 2**63 else None


def _address() -> str | None:
    """A path, or an abstract name after "@"; anything else is not for us (vsock and the like)."""
    value = os.environ.get("NOTIFY_SOCKET", "")
    if value.startswith("/"):
        return value
    return "\0" + value[1:] if value.startswith("@") and len(value) > 1 else None


def _send(text: str) -> bool:
    address = _address()
    if address is None:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto(text.encode("utf-8", "replace"), address)
    except OSError:
        return False
    return True
