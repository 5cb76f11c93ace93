"""Invalid, oversized and slow requests: each is refused, and the server keeps running."""

import random
import socket
import time
import xmlrpc.client
from contextlib import closing
from typing import Any

import pytest

from mlx_supervisor.cli.ctl.client import DaemonClient
from mlx_supervisor.control import xmlrpc_codec
from mlx_supervisor.control.transport import http_stream

DEADLINE_S = 10.0
BOMB = """<?xml version="1.0"?><!DOCTYPE bomb [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><methodCall><methodName>&c;</methodName></methodCall>"""
EXTERNAL = """<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>
<methodCall><methodName>&f;</methodName></methodCall>"""


@pytest.fixture
def alive(served):
    """The server must still answer after the test."""
    yield served
    assert DaemonClient(str(served.path)).call("supervisor.getVersion") == "3.0"


def exchange(served, *pieces: bytes) -> bytes:
    """The response to all pieces, up to the end of the connection."""
    with closing(socket.socket(socket.AF_UNIX)) as link:
        link.settimeout(DEADLINE_S)
        link.connect(str(served.path))
        said = b""
        try:
            for piece in pieces:
                link.sendall(piece)
            link.shutdown(socket.SHUT_WR)
            while data := link.recv(65536):
                said += data
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server refused the request before it had read all of it
        return said


def post(body: bytes) -> bytes:
    return b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def rpc_call(served, body: bytes) -> tuple[bytes, bytes]:
    """Status line and body of the response; the sending side stays open until it has arrived."""
    with closing(socket.socket(socket.AF_UNIX)) as link:
        link.settimeout(DEADLINE_S)
        link.connect(str(served.path))
        link.sendall(post(body))
        said = b""
        while data := link.recv(65536):
            said += data
    head, _, rest = said.partition(b"\r\n\r\n")
    return head.splitlines()[0] if head else b"", rest


def test_random_bytes(alive):
    chance = random.Random(4)
    for _ in range(50):
        exchange(alive, chance.randbytes(chance.randrange(1, 3000)))


def test_broken_copies_of_a_good_request(alive):
    chance = random.Random(5)
    good = post(xmlrpc.client.dumps(("night",), "supervisor.getProcessInfo").encode())
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(bad))
            bad[place : place + chance.randrange(2)] = chance.randbytes(chance.randrange(3))
        exchange(alive, bytes(bad))


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"431"),
        (b"A" * 100_000, b"431"),
        (b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
        (b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"PUT /RPC2 HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"POST /else HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"404"),
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /logtail/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"hello there\r\n\r\n", b"400"),
    ],
)
def test_http_that_is_refused(alive, said, status):
    assert exchange(alive, said).split(b" ")[1] == status


def test_an_endless_body_is_refused(alive):
    head = b"POST /RPC2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = exchange(alive, head, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 40)
    assert said == b"" or said.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body",
    [
        BOMB,
        EXTERNAL,
        "",
        "not XML",
        "<methodCall>",
        "<methodCall/>",
        f"<methodCall><methodName>a.b</methodName>{'<x>' * 40}{'</x>' * 40}</methodCall>",
        f"<methodCall><methodName>a.b</methodName>{'<x/>' * 20_000}</methodCall>",
        "<methodCall><methodName>a.b</methodName><params><param><value><int>x</int></value></param></params></methodCall>",
        "<methodResponse><fault><value><int>1</int></value></fault></methodResponse>",
    ],
)
def test_xml_that_is_refused(alive, body):
    began = time.monotonic()
    status, _ = rpc_call(alive, body.encode())
    assert status.startswith(b"HTTP/1.1 400 ")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "body",
    [
        "<methodCall><methodName>supervisor.getVersion</methodName></methodCall>",
        "<methodCall><methodName>supervisor.getVersion</methodName><params></params></methodCall>",
    ],
)
def test_params_are_optional(alive, body):
    assert b"<string>3.0</string>" in rpc_call(alive, body.encode())[1]


def fault_of(served, method: str, *arguments: Any) -> xmlrpc.client.Fault:
    body = xmlrpc.client.dumps(arguments, method, allow_none=True).encode()
    _, answer = rpc_call(served, body)
    with pytest.raises(xmlrpc.client.Fault) as caught:
        xmlrpc.client.loads(answer)
    return caught.value


@pytest.mark.parametrize(
    ("method", "arguments", "code"),
    [
        ("supervisor.startProcess", (), 2),
        ("supervisor.startProcess", (1,), 2),
        ("supervisor.startProcess", (None,), 2),
        ("supervisor.startProcess", (["idle"],), 2),
        ("supervisor.startProcess", ("idle", "yes"), 2),
        ("supervisor.startProcess", ("idle", True, True), 2),
        ("supervisor.readLog", (1.5, 0), 2),
        ("supervisor.readLog", ({"a": 1}, "x" * 20), 2),
        ("supervisor.signalProcess", ("night", "0"), 11),
        ("supervisor.signalProcess", ("night", "9" * 5000), 11),
        ("supervisor.signalProcess", ("night", -9), 11),
        ("supervisor.signalProcess", ("night", "__class__"), 11),
        ("system.multicall", ("x",), 2),
        ("supervisor.__init__", (), 1),
        ("supervisor.backend.shutdown", (), 1),
        ("call", (), 1),
        ("supervisor.startProcess", ("idle:other",), 10),
        ("supervisor.startProcess", ("../idle",), 10),
        ("supervisor.startProcess", ("\u2028<&>]]>" * 1000,), 10),
    ],
)
def test_wrong_calls_are_faults(alive, backend, method, arguments, code):
    fault = fault_of(alive, method, *arguments)
    assert fault.faultCode == code
    assert len(fault.faultString) < 500
    assert backend.calls == []


def test_an_exception_in_the_backend_is_a_fault(alive, backend):
    def broken(name: str) -> None:
        raise ZeroDivisionError(f"{name}\x00")

    backend.clear_logs = broken
    fault = fault_of(alive, "supervisor.clearProcessLogs", "idle")
    assert (fault.faultCode, fault.faultString) == (30, "FAILED: ZeroDivisionError: idle")


def test_a_slow_request_is_dropped_at_its_deadline(alive, monkeypatch):
    monkeypatch.setattr(http_stream, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(http_stream, "BODY_TIMEOUT_S", 0.3)
    for said in (b"", b"POST /RPC2 HT", post(b"xxxx")[:-2]):
        with closing(socket.socket(socket.AF_UNIX)) as link:
            link.settimeout(DEADLINE_S)
            link.connect(str(alive.path))
            link.sendall(said)
            while link.recv(65536):
                pass


def test_a_client_that_does_not_read_its_response_is_disconnected(alive, folder, monkeypatch):
    monkeypatch.setattr(http_stream, "WRITE_TIMEOUT_S", 0.3)
    (folder / "night-stdout.log").write_bytes(b"x" * (1 << 20))
    call = xmlrpc.client.dumps(("night", 0, 0), "supervisor.readProcessStdoutLog").encode()
    with closing(socket.socket(socket.AF_UNIX)) as link:
        link.connect(str(alive.path))
        link.sendall(post(call))
        alive.wait_until(lambda: alive.server.connections)
        alive.wait_until(lambda: not alive.server.connections)


def test_every_client_can_read_each_value():
    value = {"a": [None, 2**40, float("nan"), "\x00\x1b[1mb\ud800"], "b": None, 3: (True, -(2**31))}
    loaded = xmlrpc.client.loads(xmlrpc_codec.dump_result(value))[0][0]
    assert loaded == {"a": ["None", float(2**40), "nan", "b"], "3": [True, -(2**31)]}
