"""The control server: its socket, concurrent calls, results, and logs that are followed."""

import asyncio
import http.client
import os
import re
import socket
import stat
import threading
import xmlrpc.client
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlx_supervisor.cli.ctl import client
from mlx_supervisor.cli.ctl.client import DaemonClient
from mlx_supervisor.control.backend import Backend, ProcessState
from mlx_supervisor.control.log_reader import Follower
from mlx_supervisor.control.transport.server import CONNECTION_LIMIT, ControlServer
from mlx_supervisor.control.transport.unix_socket import SocketFileError


def connect(served) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(10)
    link.connect(str(served.path))
    return link


def request(body: bytes, path: str = "/RPC2", extra: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def call(method: str, *arguments: Any) -> bytes:
    return request(xmlrpc.client.dumps(arguments, method).encode())


def answer(link: socket.socket) -> tuple[int, object]:
    """The next answer on a connection that stays open."""
    response = http.client.HTTPResponse(link)
    response.begin()
    body = response.read()
    try:
        value: object = xmlrpc.client.loads(body)[0][0] if response.status == 200 else body
    except xmlrpc.client.Fault as fault:
        value = fault
    return response.status, value


@pytest.fixture
def daemon(served) -> DaemonClient:
    return DaemonClient(str(served.path))


# the socket


def test_only_the_owner_may_connect(served):
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.path.parent.stat().st_mode) == 0o700


def test_an_open_folder_is_closed_before_the_socket_exists(folder, backend):
    folder.chmod(0o755)

    async def serve() -> int:
        server = ControlServer(folder / "s", backend)
        await server.start()
        mode = stat.S_IMODE(folder.stat().st_mode)
        await server.close()
        return mode

    assert asyncio.run(serve()) == 0o700


def start_and_close(path: Path, backend: Backend) -> None:
    async def both() -> None:
        server = ControlServer(path, backend)
        await server.start()
        await server.close()

    asyncio.run(both())


def test_the_socket_of_a_dead_daemon_is_replaced_and_its_file_removed_at_the_end(folder, backend):
    path = folder / "supervisor.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    start_and_close(path, backend)
    assert not path.exists()
    start_and_close(path, backend)


def test_a_live_daemon_keeps_its_socket(served, backend, daemon):
    with pytest.raises(SocketFileError, match="another daemon answers on this socket"):
        start_and_close(served.path, backend)
    assert daemon.call("supervisor.getVersion") == "3.0"


def test_a_file_that_is_no_socket_is_left_alone(folder, backend):
    path = folder / "supervisor.sock"
    path.write_text("precious")
    with pytest.raises(SocketFileError, match="is not a socket"):
        start_and_close(path, backend)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_refused_with_its_length(folder, backend):
    with pytest.raises(SocketFileError, match=r"1\d\d bytes are too long"):
        start_and_close(folder / ("x" * 100), backend)


def test_another_daemons_socket_is_not_removed_at_the_end(folder, backend):
    path = folder / "supervisor.sock"

    async def replaced() -> None:
        server = ControlServer(path, backend)
        await server.start()
        path.unlink()
        path.write_text("another daemon's")
        await server.close()

    asyncio.run(replaced())
    assert path.read_text() == "another daemon's"


# calls


def test_one_connection_serves_many_calls_also_sent_ahead(served):
    with closing(connect(served)) as link:
        for _ in range(3):
            link.sendall(call("supervisor.getVersion"))
            assert answer(link) == (200, "3.0")
        link.sendall(call("supervisor.getVersion") + call("supervisor.getProcessInfo", "night"))
        assert answer(link) == (200, "3.0")


def test_a_long_start_does_not_delay_other_clients(served, backend, daemon):
    backend.hold_forever()
    with closing(connect(served)) as waiting:
        waiting.sendall(call("supervisor.startProcess", "idle"))
        backend.wait_for(("start", "idle"))
        assert daemon.call("supervisor.getProcessInfo", "idle")["statename"] == "STARTING"
        served.loop.call_soon_threadsafe(backend.hold_starts.set)
        assert answer(waiting) == (200, True)


def test_a_client_that_disconnects_cancels_nothing(served, backend):
    backend.hold_forever()
    with closing(connect(served)) as leaving:
        leaving.sendall(call("supervisor.startProcess", "idle"))
        backend.wait_for(("start", "idle"))
    served.wait_until(lambda: not served.server.connections)  # its connection no longer counts against the limit
    served.loop.call_soon_threadsafe(backend.hold_starts.set)
    backend.wait_for(("started", "idle"))


def test_without_wait_the_answer_comes_at_once(served, backend, daemon):
    backend.hold_forever()
    assert daemon.call("supervisor.startProcess", "idle", False) is True
    backend.wait_for(("start", "idle"))
    with pytest.raises(xmlrpc.client.Fault, match="ALREADY_STARTED: idle"):
        daemon.call("supervisor.startProcess", "idle", False)
    served.loop.call_soon_threadsafe(backend.hold_starts.set)
    backend.wait_for(("started", "idle"))


def test_connections_over_the_limit_are_refused_with_503(served, daemon):
    links = [connect(served) for _ in range(CONNECTION_LIMIT)]
    for link in links:
        link.sendall(call("supervisor.getVersion"))
        assert answer(link)[0] == 200
    with closing(connect(served)) as late:
        assert answer(late)[0] == 503
    for link in links:
        link.close()
    served.wait_until(lambda: not served.server.connections)
    assert daemon.call("supervisor.getVersion") == "3.0"


def test_process_info_has_every_key_of_the_type_that_exporters_expect(daemon, backend, folder):
    backend.put("idle", ProcessState.FATAL, exit_status=255, started_at_s=9e9, detail="gave up")
    info = daemon.call("supervisor.getProcessInfo", "idle")
    log = f"{folder}/idle-stdout.log"
    assert info.pop("now") > 1.6e9
    assert info == {
        "name": "idle",
        "group": "idle",
        "start": 2**31 - 1,
        "stop": 0,
        "state": 200,
        "statename": "FATAL",
        "spawnerr": "gave up",
        "exitstatus": 127,
        "logfile": log,
        "stdout_logfile": log,
        "stderr_logfile": f"{folder}/idle-stderr.log",
        "pid": 0,
        "description": "gave up",
    }
    backend.put("idle", ProcessState.EXITED, exit_status=-9)
    assert daemon.call("supervisor.getProcessInfo", "idle")["exitstatus"] == -1


def test_every_method_has_help_and_a_signature(daemon):
    methods = daemon.call("system.listMethods")
    assert len(methods) == len(set(methods)) > 40
    for method in methods:
        signature, _, purpose = daemon.call("system.methodHelp", method).partition("\n\n")
        assert signature.startswith(f"{method}(")
        assert purpose.endswith(".")
    assert daemon.call("system.methodSignature", "supervisor.startProcess") == ["boolean", "string", "boolean"]
    assert daemon.call("system.methodSignature", "supervisor.signalProcess") == ["boolean", "string", "string"]
    with pytest.raises(xmlrpc.client.Fault, match="SIGNATURE_UNSUPPORTED"):
        daemon.call("system.methodHelp", "os.system")


def test_multicall_answers_as_supervisord_does(daemon):
    calls = [
        {"methodName": "supervisor.getVersion"},
        {"methodName": "supervisor.startProcess", "params": ["nix"]},
        {"methodName": "system.multicall", "params": [[]]},
        {"params": []},
        "not a call",
    ]
    results = daemon.call("system.multicall", calls)
    assert results[0] == "3.0"
    assert results[1] == {"faultCode": 10, "faultString": "BAD_NAME: nix"}
    assert [result["faultCode"] for result in results[2:]] == [2, 2, 2]
    with pytest.raises(xmlrpc.client.Fault, match="at most 64"):
        daemon.call("system.multicall", calls * 13)


def test_state_of_a_daemon_that_shuts_down(daemon, backend):
    assert daemon.call("supervisor.getState") == {"statecode": 1, "statename": "RUNNING"}
    assert daemon.call("supervisor.shutdown") is True
    assert daemon.call("supervisor.getState") == {"statecode": -1, "statename": "SHUTDOWN"}
    with pytest.raises(xmlrpc.client.Fault) as caught:
        daemon.call("supervisor.addProcessGroup", "x")
    assert caught.value.faultCode == 6


def test_stdin_is_refused(daemon):
    for name, code in (("night", 20), ("idle", 70), ("nix", 10)):
        with pytest.raises(xmlrpc.client.Fault) as caught:
            daemon.call("supervisor.sendProcessStdin", name, "x")
        assert caught.value.faultCode == code


# logs


def test_reading_a_log_in_pieces(daemon, folder):
    log = folder / "night-stdout.log"
    log.write_text("0123456789")
    read = "supervisor.readProcessStdoutLog"
    assert daemon.call(read, "night", 0, 4) == "0123"
    assert daemon.call(read, "night", 4, 0) == "456789"
    assert daemon.call(read, "night", -3, 0) == "789"
    assert daemon.call(read, "night", -99, 0) == "0123456789"
    assert daemon.call(read, "night", 99, 5) == ""
    for offset, length in ((-3, 3), (0, -1)):
        with pytest.raises(xmlrpc.client.Fault, match="BAD_ARGUMENTS"):
            daemon.call(read, "night", offset, length)
    log.write_bytes(b"x" * (3 << 20))
    assert len(daemon.call(read, "night", 0, 0)) == 1 << 20
    assert len(daemon.call(read, "night", -(2 << 20), 0)) == 1 << 20


def test_tailing_continues_at_the_returned_offset_and_never_splits_a_character(daemon, folder):
    log = folder / "night-stdout.log"
    tail = "supervisor.tailProcessStdoutLog"
    assert daemon.call(tail, "night", 0, 100) == ["", 0, False]
    whole = "löss ∞".encode()
    log.write_bytes(whole[:-1])
    text, offset, overflow = daemon.call(tail, "night", 0, 100)
    assert (text, overflow) == ("löss ", False)
    log.write_bytes(whole)
    assert daemon.call(tail, "night", offset, 100) == ["∞", len(whole), False]
    assert daemon.call(tail, "night", len(whole), 100) == ["", len(whole), False]
    assert daemon.call(tail, "night", 0, 2) == ["", len(whole), True]
    assert daemon.call(tail, "night", 999, 100) == ["", len(whole), False]


def follow(served, path: str, extra: bytes = b"\r\n") -> socket.socket:
    link = connect(served)
    link.sendall(f"GET {path} HTTP/1.1\r\nHost: \r\nAccept-Encoding: chunked\r\n\r\n".encode() + extra)
    return link


def read_head(link: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += link.recv(1)
    return data


def test_the_stock_client_can_parse_logtail(served, folder):
    log = folder / "night-stdout.log"
    log.write_bytes(b"y" * 2000 + "∞\n".encode())
    with closing(follow(served, "/logtail/night")) as link:
        head = read_head(link)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert re.search(rb"(?im)^transfer-encoding: *chunked\r$", head)
        assert b"chunked" in head
        with link.makefile("rb") as stream:
            size = int(stream.readline(), 16)
            assert stream.read(size).decode() == "y" * (1024 - 4) + "∞\n"


def test_logtail_of_a_missing_log_is_404(served, folder):
    (folder / "idle-stdout.log").write_text("x")
    for path in ("/logtail/nix", "/logtail/night", "/logtail/idle/stdin", "/logtail", "/logtail/idle/stdout/x", "/etc"):
        with closing(follow(served, path)) as link:
            assert answer(link)[0] == 404


def test_a_refused_client_may_still_send(served):
    with closing(follow(served, "/logtail/nix", extra=b"")) as link:
        assert b" 404 " in read_head(link)
        while link.recv(4096):
            pass  # the whole response
        link.sendall(b"\r\n")  # as Supervisord's client does, in a write of its own; it fails on a closed socket


def test_a_follower_of_a_quiet_log_that_disconnects_frees_its_connection(served, folder):
    (folder / "night-stdout.log").write_text("x")
    with closing(follow(served, "/logtail/night/stdout")) as link:
        read_head(link)
        said = b""
        while not said.endswith(b"1\r\nx\r\n"):
            said += link.recv(100)  # nothing more to send, so no failed write shows that the client disconnected
    served.wait_until(lambda: not served.server.connections)


def test_following_survives_every_rotation(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n")
    follower = Follower(log)
    assert follower.poll() == "one\n"
    assert follower.poll() == ""
    os.truncate(log, 0)  # copytruncate
    log.write_text("2\n")
    assert follower.poll() == "==> File truncated <==\n"
    assert follower.poll() == "2\n"
    with log.open("a") as file:
        log.rename(tmp_path / "log.1")
        file.write("last words\n")
    assert follower.poll() == "last words\n"
    assert follower.poll() == "", "no file exists between the two"
    log.write_text("three\n")
    assert follower.poll() == "three\n"
    follower.close()


def test_following_reads_what_was_written_just_before_the_rotation(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n")

    class RotatedPath(type(log)):  # type: ignore[misc]  # Path itself cannot be subclassed before Python 3.12
        """Rotates when the follower has read the log and checks whether it was replaced."""

        def stat(self, **options):
            if not (tmp_path / "log.1").exists():
                with log.open("a") as file:
                    file.write("last words\n")
                log.rename(tmp_path / "log.1")
                log.write_text("new\n")
            return super().stat(**options)

    follower = Follower(RotatedPath(log))
    assert follower.poll() == "one\n"
    assert follower.poll() == "last words\n"
    assert follower.poll() == "new\n"
    follower.close()


def test_the_client_follows_a_log_that_is_quiet_for_longer_than_its_timeout(daemon, folder, monkeypatch):
    monkeypatch.setattr(client, "QUICK_TIMEOUT_S", 0.3)
    log = folder / "night-stdout.log"
    log.write_text("before\n")
    pieces = daemon.follow("/logtail/night")
    assert next(pieces) == b"before\n"

    def write() -> None:
        with log.open("a") as file:
            file.write("after\n")

    writer = threading.Timer(0.6, write)
    writer.start()
    assert next(pieces) == b"after\n"
    writer.join()
    pieces.close()


def test_following_gives_whole_characters(tmp_path):
    log = tmp_path / "log"
    whole = "∞".encode()
    log.write_bytes(whole[:1])
    follower = Follower(log)
    assert follower.poll() == ""
    with log.open("ab") as file:
        file.write(whole[1:] + b"\xff\n")
    assert follower.poll() == "∞\N{REPLACEMENT CHARACTER}\n"
    follower.close()
    log.write_bytes("∞".encode() * 1000)
    follower = Follower(log)
    assert set(follower.poll()) == {"∞"}
    follower.close()
