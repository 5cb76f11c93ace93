"""One client's connection: HTTP by h11, one request after the other, each part of it with a limit and a deadline."""

import asyncio
import contextlib
import urllib.parse

import h11

from mlx_supervisor.control import xmlrpc_codec
from mlx_supervisor.control.backend import Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher
from mlx_supervisor.control.handlers import Interface
from mlx_supervisor.control.log_reader import Follower

BODY_LIMIT_BYTES = 1024 * 1024
HEADER_LIMIT_BYTES = 16 * 1024
HEADER_TIMEOUT_S = 60.0
"""From the end of one answer, or from connecting, to the end of the next request's headers."""
BODY_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
LINGER_S = 2.0
READ_BYTES = 64 * 1024


class _StatusError(Exception):
    """The request is answered with an HTTP status, and the connection closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _GoneError(Exception):
    """The client closed its end, or is too slow; nothing more can be said to it."""


class Connection:
    """Serves one client until it leaves. `calls` holds the calls under way, which outlive the connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        dispatcher: Dispatcher,
        interface: Interface,
        calls: set[asyncio.Task[object]],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._dispatcher = dispatcher
        self._interface = interface
        self._calls = calls
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_LIMIT_BYTES)
        self._reading: asyncio.Task[bytes] | None = None
        self._leaving = False
        self._answering = False

    def leave(self) -> bool:
        """Begin nothing new. True when an answer is on its way, which is worth waiting for."""
        self._leaving = True
        return self._answering

    def abort(self) -> None:
        """Close at once, without a word."""
        self._writer.transport.abort()

    async def refuse(self) -> None:
        """Answer that there are too many connections, and close."""
        try:
            await self._say(503, "Too many connections")
        finally:
            await self._close()

    async def serve(self) -> None:
        """Answer requests until the client leaves, misbehaves or stays silent for too long."""
        try:
            while not self._leaving:
                await self._serve_one()
                if self._http.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    return
                self._http.start_next_cycle()
        except (_GoneError, ConnectionError):
            pass
        except _StatusError as refused:
            await self._say(refused.status, refused.reason)
        except h11.RemoteProtocolError as error:
            await self._say(error.error_status_hint, str(error))
        finally:
            await self._close()

    async def _serve_one(self) -> None:
        request = await self._request()
        body = await self._body(request)
        path = request.target.decode("ascii", "replace").partition("?")[0]
        if request.method == b"POST" and path.rstrip("/") == "/RPC2":
            self._answering = True
            await self._answer_call(body)
            self._answering = False
        elif request.method == b"GET":
            await self._follow(path)
        else:
            raise _StatusError(400 if path == "/RPC2" else 404, "POST to /RPC2, or GET /logtail/NAME or /mainlogtail")

    async def _request(self) -> h11.Request:
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                event = await self._event()
        except TimeoutError:
            raise _GoneError from None
        if isinstance(event, h11.Request):
            return event
        raise _GoneError

    async def _body(self, request: h11.Request) -> bytes:
        for name, value in request.headers:
            if name == b"content-length" and int(value) > BODY_LIMIT_BYTES:
                raise _StatusError(413, f"at most {BODY_LIMIT_BYTES} bytes are taken")
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while isinstance(event := await self._event(), h11.Data):
                    body += event.data
                    if len(body) > BODY_LIMIT_BYTES:
                        raise _StatusError(413, f"at most {BODY_LIMIT_BYTES} bytes are taken")
        except TimeoutError:
            raise _StatusError(408, "the request did not arrive in time") from None
        return bytes(body)

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._incoming())
            self._reading = None
        return event

    def _incoming(self) -> "asyncio.Task[bytes]":
        """The one read under way; whoever takes its data sets `_reading` back to None."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._reader.read(READ_BYTES))
        return self._reading

    # XML-RPC

    async def _answer_call(self, body: bytes) -> None:
        try:
            name, arguments = xmlrpc_codec.load_call(body)
        except xmlrpc_codec.CallError as error:
            raise _StatusError(400, str(error)) from None
        call: asyncio.Task[object] = asyncio.create_task(self._dispatcher.call(name, arguments))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(_retrieve)
        await self._while_connected(call)
        try:
            answer = xmlrpc_codec.dump_result(call.result())
        except Fault as fault:
            answer = xmlrpc_codec.dump_fault(fault.code, str(fault))
        except asyncio.CancelledError:  # the call's, by `ControlServer.close`
            answer = xmlrpc_codec.dump_fault(FaultCode.SHUTDOWN_STATE, "SHUTDOWN_STATE: the supervisor is gone")
        headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(answer)))]
        if self._leaving:
            headers.append(("Connection", "close"))
        await self._send(h11.Response(status_code=200, reason=b"OK", headers=headers))
        await self._send(h11.Data(data=answer))
        await self._send(h11.EndOfMessage())

    async def _while_connected(self, call: "asyncio.Task[object]") -> None:
        """Wait for the call. Raises _GoneError when the client leaves first; the call goes on without it."""
        more = self._incoming()
        await asyncio.wait({call, more}, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            self._reading = None
            data = more.result()
            if not data:
                raise _GoneError
            self._http.receive_data(data)  # the next request, sent before the answer to this one
            await asyncio.wait({call})

    # logs that go on

    async def _follow(self, path: str) -> None:
        follower = self._follower(urllib.parse.unquote(path).strip("/").split("/"))
        try:
            headers = [
                ("Content-Type", "text/plain;charset=utf-8"),
                ("Transfer-Encoding", "chunked"),
                ("Connection", "close"),
            ]
            await self._send(h11.Response(status_code=200, reason=b"OK", headers=headers))
            gone = asyncio.create_task(self._until_gone())
            copying = asyncio.create_task(self._copy(follower))
            try:
                await asyncio.wait({gone, copying}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                copying.cancel()
                await asyncio.gather(gone, copying, return_exceptions=True)
        finally:
            follower.close()
        raise _GoneError

    def _follower(self, parts: list[str]) -> Follower:
        try:
            match parts:
                case ["mainlogtail"]:
                    log = self._interface.main_log()
                case ["logtail", name] | ["logtail", name, "stdout"]:
                    log = self._interface.log(name, "stdout")
                case ["logtail", name, "stderr"]:
                    log = self._interface.log(name, "stderr")
                case _:
                    raise _StatusError(
                        404, "there are /logtail/NAME, /logtail/NAME/stdout, /logtail/NAME/stderr and /mainlogtail"
                    )
            return Follower(log)
        except (Fault, OSError) as error:
            raise _StatusError(404, str(error)) from None

    async def _copy(self, follower: Follower) -> None:
        async for text in follower.texts():
            self._write(h11.Data(data=text.encode("utf-8", "replace")))
            await self._writer.drain()  # without a deadline: a terminal may be held for hours

    async def _until_gone(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._incoming():
                self._reading = None  # Supervisord's client sends an empty line after its request

    # writing

    def _write(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(data)

    async def _send(self, event: h11.Event) -> None:
        self._write(event)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            raise _GoneError from None

    async def _say(self, status: int, reason: str) -> None:
        with contextlib.suppress(_GoneError, ConnectionError, h11.LocalProtocolError):
            await self._plain(status, reason)
            await self._linger()

    async def _linger(self) -> None:
        """Hear the client out for a moment: closed while it still sends, it would fail before reading the answer."""
        self._writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._until_gone()

    async def _plain(self, status: int, reason: str) -> None:
        text = xmlrpc_codec.clean(reason).encode() + b"\n"
        headers = [
            ("Content-Type", "text/plain;charset=utf-8"),
            ("Content-Length", str(len(text))),
            ("Connection", "close"),
        ]
        phrase = _REASONS.get(status, b"Refused")
        await self._send(h11.Response(status_code=status, reason=phrase, headers=headers))
        await self._send(h11.Data(data=text))
        await self._send(h11.EndOfMessage())

    async def _close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (TimeoutError, ConnectionError):
            self._writer.transport.abort()


_REASONS = {
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
}


def _retrieve(task: "asyncio.Task[object]") -> None:
    if not task.cancelled():
        task.exception()  # seen, so that a fault that nobody waited for is not reported as forgotten
