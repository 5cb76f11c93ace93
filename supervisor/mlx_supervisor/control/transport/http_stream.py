"""HTTP over one connection: requests and responses by h11, each with a limit and a deadline."""

import asyncio
import contextlib

import h11

from mlx_supervisor.control import xmlrpc_codec

BODY_LIMIT_BYTES = 1024 * 1024
HEADER_LIMIT_BYTES = 16 * 1024
HEADER_TIMEOUT_S = 60.0
"""From the end of one response, or from connecting, to the end of the next request's headers."""
BODY_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
LINGER_S = 2.0
READ_BYTES = 64 * 1024
PLAIN_TEXT = ("Content-Type", "text/plain;charset=utf-8")
_REASONS = {
    400: b"Bad Request",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
}


class HttpStatusError(Exception):
    """The request is answered with this HTTP status, and the connection closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class DisconnectedError(Exception):
    """The client disconnected or missed a deadline; nothing more can be sent to it."""


class HttpStream:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_LIMIT_BYTES)
        self._reading: asyncio.Task[bytes] | None = None

    async def request(self) -> h11.Request:
        """The next request's head. Raises DisconnectedError, h11.RemoteProtocolError."""
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                event = await self._event()
        except TimeoutError:
            raise DisconnectedError from None
        if isinstance(event, h11.Request):
            return event
        raise DisconnectedError

    async def body(self, request: h11.Request) -> bytes:
        """The request's body. Raises HttpStatusError, h11.RemoteProtocolError."""
        for name, value in request.headers:
            if name == b"content-length" and int(value) > BODY_LIMIT_BYTES:
                raise HttpStatusError(413, f"the body is limited to {BODY_LIMIT_BYTES} bytes")
        if self._http.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while isinstance(event := await self._event(), h11.Data):
                    body += event.data
                    if len(body) > BODY_LIMIT_BYTES:
                        raise HttpStatusError(413, f"the body is limited to {BODY_LIMIT_BYTES} bytes")
        except TimeoutError:
            raise HttpStatusError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        return bytes(body)

    def next_cycle(self) -> bool:
        """Prepare for another request. False when the connection must close instead."""
        if self._http.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
            return False
        self._http.start_next_cycle()
        return True

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._incoming())
            self._reading = None
        return event

    def _incoming(self) -> "asyncio.Task[bytes]":
        """The only read under way; the caller that takes its data sets `_reading` back to None."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._reader.read(READ_BYTES))
        return self._reading

    async def wait_for(self, task: "asyncio.Task[object]") -> None:
        """Wait until the task is done. Raises DisconnectedError when the client disconnects first."""
        more = self._incoming()
        await asyncio.wait({task, more}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self._reading = None
            data = more.result()
            if not data:
                raise DisconnectedError
            self._http.receive_data(data)  # the next request, sent before the response to this one
            await asyncio.wait({task})

    async def until_disconnected(self) -> None:
        """Discard what the client sends, until it disconnects."""
        with contextlib.suppress(ConnectionError):
            while await self._incoming():
                self._reading = None  # Supervisord's client sends an empty line after its request

    async def send(self, event: h11.Event, deadline: bool = True) -> None:
        """Send a part of a response. Without `deadline`, the client may take any time to read it."""
        data = self._http.send(event)
        if data:
            self._writer.write(data)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S if deadline else None):
                await self._writer.drain()
        except TimeoutError:
            raise DisconnectedError from None

    async def respond(self, status: int, reason: bytes, headers: list[tuple[str, str]], body: bytes) -> None:
        """Send a whole response."""
        headers.insert(1, ("Content-Length", str(len(body))))
        await self.send(h11.Response(status_code=status, reason=reason, headers=headers))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def refuse(self, status: int, reason: str) -> None:
        """Answer with an error in plain text. The connection must be closed afterwards."""
        with contextlib.suppress(DisconnectedError, ConnectionError, h11.LocalProtocolError):
            text = xmlrpc_codec.clean(reason).encode() + b"\n"
            await self.respond(status, _REASONS.get(status, b"Refused"), [PLAIN_TEXT, ("Connection", "close")], text)
            # a close while the client still sends would make it fail before it reads the response
            self._writer.write_eof()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self.until_disconnected()

    def abort(self) -> None:
        """Close at once, without a response."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close once the client has read everything, or the deadline has passed."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (TimeoutError, ConnectionError):
            self._writer.transport.abort()
