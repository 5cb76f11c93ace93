"""Messages to systemd, and to one that is absent or does not read."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_supervisor.host import sd_notify


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_each_message_is_one_datagram(systemd: socket.socket) -> None:
    assert sd_notify.ready()
    assert sd_notify.watchdog()
    assert sd_notify.stopping()
    assert [systemd.recv(4096) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(f"\0mlx-supervisor-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@mlx-supervisor-test-{os.getpid()}")
        sd_notify.ready()
        assert listener.recv(64) == b"READY=1"


@pytest.mark.parametrize("value", ["", "@", "relative/path", "vsock:2:1234"])
def test_without_an_address_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    assert not sd_notify.ready()
    assert sd_notify.watchdog_interval_s() is None
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not sd_notify.ready()


@pytest.mark.parametrize("name", ["none", "long" * 50])
def test_an_unreachable_peer_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / name))
    assert not sd_notify.ready()


def test_a_peer_that_does_not_read_never_blocks(systemd: socket.socket) -> None:
    assert not all(sd_notify.watchdog() for _ in range(10_000))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({"WATCHDOG_USEC": str(2**64 - 1)}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval_is_the_one_systemd_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: float | None
) -> None:
    for key in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"NOTIFY_SOCKET": "/run/none", **variables}.items():
        monkeypatch.setenv(key, value)
    assert sd_notify.watchdog_interval_s() == expected
