"""Messages to systemd: one datagram each to NOTIFY_SOCKET (sd_notify(3)). Without systemd, nothing is sent.

Never raises: training continues when systemd can't be reached. Each function returns whether the message was sent.
"""

import os
import socket


def ready() -> bool:
    """The daemon accepts commands."""
    return _send("READY=1")


def watchdog() -> bool:
    """The event loop is alive. Must be sent from that loop."""
    return _send("WATCHDOG=1")


def stopping() -> bool:
    """The daemon is shutting down."""
    return _send("STOPPING=1")


def watchdog_interval_s() -> float | None:
    """The watchdog timeout in seconds; None without a watchdog (sd_watchdog_enabled(3)). Send at half of it."""
    if _address() is None:
        return None
    try:
        allowed_us = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = os.environ.get("WATCHDOG_PID", "")
        meant = pid == "" or int(pid) == os.getpid()
    except ValueError:
        return None
    return allowed_us / 1e6 if meant and 0 < allowed_us < 2**63 else None


def _address() -> str | None:
    """A path, or an abstract name after "@". Other kinds (vsock) are ignored."""
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
