"""The control socket: accepts connections, up to a limit, and closes them."""

import asyncio
from pathlib import Path

import structlog

from mlx_supervisor.control.backend import Backend
from mlx_supervisor.control.dispatcher import Dispatcher, cancel
from mlx_supervisor.control.handlers.table import METHODS
from mlx_supervisor.control.transport.connection import Connection
from mlx_supervisor.control.transport.http_stream import HttpStream
from mlx_supervisor.control.transport.unix_socket import SocketFile

CONNECTION_LIMIT = 64
"""More connections are refused (503) and closed."""
FAREWELL_S = 1.0
"""How long `close` waits for responses being sent, such as the one to `shutdown`."""
_log = structlog.get_logger("control")


class ControlServer:
    """Serves `backend` on a Unix socket at `path`, for the owner of its folder only."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self._path = path
        self._dispatcher = Dispatcher(backend, METHODS)
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self._refusals: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[object]] = set()
        self._file: SocketFile | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises SocketFileError: the path is too long, another user's, or in use by another daemon."""
        assert self._file is None, "started twice"
        self._file = SocketFile(self._path)
        try:
            self._server = await asyncio.start_unix_server(self._connected, sock=self._file.socket)
        except BaseException:
            self._file.socket.close()
            self._file.close()
            self._file = None
            raise

    async def close(self) -> None:
        """Stop listening, finish responses being sent, cancel running calls, and close all connections."""
        if self._file is None or self._server is None:
            return
        self._server.close()
        answering = [task for task, connection in self.connections.items() if connection.leave()]
        await _wait(answering)
        await cancel(self._calls)
        await _wait([task for task in answering if not task.done()])
        await cancel((*self.connections, *self._refusals))
        self._file.close()
        self._file = self._server = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = HttpStream(reader, writer)
        if len(self.connections) >= CONNECTION_LIMIT:
            self._refuse(stream)
            return
        connection = Connection(stream, self._dispatcher, self._calls)
        task = asyncio.create_task(connection.serve())
        self.connections[task] = connection
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.connections.pop(task, None)
        if not task.cancelled() and (error := task.exception()):
            _log.error("control_connection_failed", error=repr(error), exc_info=error)

    def _refuse(self, stream: HttpStream) -> None:
        if len(self._refusals) >= CONNECTION_LIMIT:
            stream.abort()
            return
        task = asyncio.create_task(_turn_away(stream))
        self._refusals.add(task)
        task.add_done_callback(self._refusals.discard)


async def _turn_away(stream: HttpStream) -> None:
    try:
        await stream.refuse(503, "Too many connections")
    finally:
        await stream.close()


async def _wait(tasks: list[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=FAREWELL_S)
