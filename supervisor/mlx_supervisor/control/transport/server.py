"""The control socket: who may connect, how many at once, and how it ends."""

import asyncio
from pathlib import Path

import structlog

from mlx_supervisor.control.backend import Backend
from mlx_supervisor.control.dispatcher import Dispatcher
from mlx_supervisor.control.handlers.table import METHODS
from mlx_supervisor.control.transport.connection import Connection
from mlx_supervisor.control.transport.http_stream import HttpStream
from mlx_supervisor.control.transport.unix_socket import SocketFile

CONNECTION_LIMIT = 64
"""More are told so (503) and closed."""
FAREWELL_S = 1.0
"""How long `close` waits for answers that are on their way, such as the one to `shutdown`."""
_log = structlog.get_logger("control")


class ControlServer:
    """Serves `backend` on a Unix socket at `path`, to the owner of its folder only."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self._path = path
        self._dispatcher = Dispatcher(backend, METHODS)
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self._refusals: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[object]] = set()
        self._file: SocketFile | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises SocketFileError: the path is too long, not ours, or another daemon answers there."""
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
        """Stop listening, let answers under way go out, end every connection, and cancel every call still running."""
        if self._file is None or self._server is None:
            return
        self._server.close()
        answering = [task for task, connection in self.connections.items() if connection.leave()]
        await _wait(answering)
        await _cancel(self._calls)
        await _wait([task for task in answering if not task.done()])
        await _cancel({*self.connections, *self._refusals})
        await self._dispatcher.close()
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


async def _cancel(tasks: set[asyncio.Task[None]] | set[asyncio.Task[object]]) -> None:
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
