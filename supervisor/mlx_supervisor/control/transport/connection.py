"""One client's connection: calls, and logs that it follows, one request after the other."""

import asyncio
import urllib.parse

import h11

from mlx_supervisor.control import xmlrpc_codec
from mlx_supervisor.control.backend import Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher, cancel
from mlx_supervisor.control.handlers import logs
from mlx_supervisor.control.log_reader import Follower
from mlx_supervisor.control.transport.http_stream import PLAIN_TEXT, DisconnectedError, HttpStatusError, HttpStream


class Connection:
    """Serves one client until it disconnects. `calls` holds running calls, which outlive the connection."""

    def __init__(self, stream: HttpStream, dispatcher: Dispatcher, calls: set[asyncio.Task[object]]) -> None:
        self._stream = stream
        self._dispatcher = dispatcher
        self._calls = calls
        self._leaving = False
        self._answering = False

    def leave(self) -> bool:
        """Accept no further request. True while a call is being answered."""
        self._leaving = True
        return self._answering

    async def serve(self) -> None:
        """Answer requests until the client disconnects, misbehaves or stays silent for too long."""
        try:
            while not self._leaving:
                await self._serve_one()
                if not self._stream.next_cycle():
                    return
        except (DisconnectedError, ConnectionError):
            pass
        except HttpStatusError as error:
            await self._stream.refuse(error.status, error.reason)
        except h11.RemoteProtocolError as error:
            await self._stream.refuse(error.error_status_hint, str(error))
        finally:
            await self._stream.close()

    async def _serve_one(self) -> None:
        request = await self._stream.request()
        body = await self._stream.body(request)
        path = request.target.decode("ascii", "replace").partition("?")[0]
        if request.method == b"POST" and path.rstrip("/") == "/RPC2":
            self._answering = True
            await self._answer_call(body)
            self._answering = False
        elif request.method == b"GET":
            await self._follow(path)
        else:
            raise HttpStatusError(
                400 if path == "/RPC2" else 404, "allowed: POST /RPC2, GET /logtail/NAME and GET /mainlogtail"
            )

    async def _answer_call(self, body: bytes) -> None:
        try:
            name, arguments = xmlrpc_codec.load_call(body)
        except xmlrpc_codec.CallError as error:
            raise HttpStatusError(400, str(error)) from None
        call: asyncio.Task[object] = asyncio.create_task(self._dispatcher.call(name, arguments))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(_retrieve)
        await self._stream.wait_for(call)  # the call continues when the client disconnects
        try:
            answer = xmlrpc_codec.dump_result(call.result())
        except Fault as fault:
            answer = xmlrpc_codec.dump_fault(fault.code, str(fault))
        except asyncio.CancelledError:  # the call's, by `ControlServer.close`
            answer = xmlrpc_codec.dump_fault(FaultCode.SHUTDOWN_STATE, "SHUTDOWN_STATE: the supervisor has shut down")
        headers = [("Content-Type", "text/xml"), *([("Connection", "close")] if self._leaving else [])]
        await self._stream.respond(200, b"OK", headers, answer)

    async def _follow(self, path: str) -> None:
        follower = self._follower(urllib.parse.unquote(path).strip("/").split("/"))
        try:
            headers = [PLAIN_TEXT, ("Transfer-Encoding", "chunked"), ("Connection", "close")]
            await self._stream.send(h11.Response(status_code=200, reason=b"OK", headers=headers))
            disconnected = asyncio.create_task(self._stream.until_disconnected())
            copying = asyncio.create_task(self._copy(follower))
            try:
                await asyncio.wait({disconnected, copying}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel((disconnected, copying))
        finally:
            follower.close()
        raise DisconnectedError

    def _follower(self, parts: list[str]) -> Follower:
        backend = self._dispatcher.backend
        try:
            match parts:
                case ["mainlogtail"]:
                    log = logs.main_log_path(backend)
                case ["logtail", name] | ["logtail", name, "stdout"]:
                    log = logs.log_path(backend, name, "stdout")
                case ["logtail", name, "stderr"]:
                    log = logs.log_path(backend, name, "stderr")
                case _:
                    raise HttpStatusError(
                        404, "allowed: /logtail/NAME, /logtail/NAME/stdout, /logtail/NAME/stderr and /mainlogtail"
                    )
            return Follower(log)
        except (Fault, OSError) as error:
            raise HttpStatusError(404, str(error)) from None

    async def _copy(self, follower: Follower) -> None:
        async for text in follower.texts():
            # without a deadline: a user may pause the terminal for hours
            await self._stream.send(h11.Data(data=text.encode("utf-8", "replace")), deadline=False)


def _retrieve(task: "asyncio.Task[object]") -> None:
    if not task.cancelled():
        task.exception()  # retrieved, or asyncio would report the fault of a call whose client disconnected
