"""systemd hears what it should, and a deaf or absent one disturbs nobody."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_supervisor.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(str(tmp_path / "notify"))
        yield listener


def test_each_word_is_one_datagram(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    notifier.ready()
    notifier.status("step 3 of 10\nREADY=0\x00")
    notifier.watchdog()
    notifier.stopping()
    heard = [systemd.recv(4096) for _ in range(4)]
    assert heard == [b"READY=1", b"STATUS=step 3 of 10 READY=0\x00", b"WATCHDOG=1", b"STOPPING=1"]
    notifier.status("x" * 10_000)
    assert len(systemd.recv(4096)) < 600


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(f"\0mlx-supervisor-test-{os.getpid()}")
        Notifier({"NOTIFY_SOCKET": f"@mlx-supervisor-test-{os.getpid()}"}).ready()
        assert listener.recv(64) == b"READY=1"


@pytest.mark.parametrize("value", ["", "@", "relative/path", "vsock:2:1234"])
def test_nobody_to_tell_is_silence(value: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": value, "WATCHDOG_USEC": "1000000"})
    notifier.ready()
    assert not notifier.enabled
    assert notifier.watchdog_interval_s is None
    assert notifier.failures == 0


def test_a_dead_peer_is_counted_not_raised(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / ("long" * 50)):
        notifier = Notifier({"NOTIFY_SOCKET": str(path)})
        notifier.ready()
        assert notifier.failures == 1


def test_a_peer_that_does_not_read_never_blocks(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    for _ in range(10_000):
        notifier.watchdog()
    assert notifier.failures > 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({"WATCHDOG_USEC": str(2**64 - 1)}, None),
        ({}, None),
    ],
)
def test_watchdog_interval_is_half_of_what_is_allowed(variables: dict[str, str], expected: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/none", **variables}).watchdog_interval_s == expected
