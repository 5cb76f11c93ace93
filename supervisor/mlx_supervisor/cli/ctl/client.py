"""The daemon's client: XML-RPC and logs to follow over its Unix socket, with the standard library only."""

import http.client
import socket
import xmlrpc.client
from collections.abc import Iterator
from typing import Any

QUICK_TIMEOUT_S = 10.0
"""For calls that the daemon answers at once; calls that wait for a run have no timeout."""
UNKNOWN_METHOD = 1


class DaemonError(Exception):
    """The daemon cannot be reached or does not answer. `absent`: no daemon is running."""

    def __init__(self, text: str, absent: bool = False) -> None:
        super().__init__(text)
        self.absent = absent


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self.timeout_s: float | None = QUICK_TIMEOUT_S

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        kept = self._connection[1] or _UnixConnection(self._path, self.timeout_s)
        self._connection = host, kept  # the base class closes it after an error
        kept.timeout = self.timeout_s
        if kept.sock is not None:
            kept.sock.settimeout(self.timeout_s)
        return kept


class DaemonClient:
    """The daemon that listens at `path`. Connects with the first call."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._transport = _UnixTransport(path)
        self._proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=self._transport)

    def call(self, method: str, *arguments: Any, waits: bool = False) -> Any:
        """The result of a call. `waits`: it lasts until a run has started or stopped, so without a timeout.

        Raises xmlrpc.client.Fault, DaemonError.
        """
        self._transport.timeout_s = None if waits else QUICK_TIMEOUT_S
        try:
            return getattr(self._proxy, method)(*arguments)
        except xmlrpc.client.Fault:
            raise
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise self._explained(error) from error

    def follow(self, path: str) -> Iterator[bytes]:
        """The end of a log and all that is appended, until the daemon closes it. Raises DaemonError."""
        connection = _UnixConnection(self.path, QUICK_TIMEOUT_S)
        try:
            connection.request("GET", path)
            stream = connection.sock
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise DaemonError(response.read(4096).decode("utf-8", "replace").strip() or response.reason)
            stream.settimeout(None)  # a log may be quiet for any time
            while data := response.read1(65536):
                yield data
        except (OSError, http.client.HTTPException) as error:
            raise self._explained(error) from error
        finally:
            connection.close()

    def _explained(self, error: Exception) -> DaemonError:
        if isinstance(error, TimeoutError):
            return DaemonError(f"{self.path}: the supervisor did not answer within {QUICK_TIMEOUT_S:g} s")
        if isinstance(error, xmlrpc.client.ProtocolError):
            return DaemonError(f"{self.path}: the supervisor refused the request: {error.errcode} {error.errmsg}")
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return DaemonError(f"no supervisor answers at {self.path} ({error.strerror})", absent=True)
        if isinstance(error, PermissionError):
            return DaemonError(f"{self.path} belongs to another user ({error.strerror})")
        if isinstance(error, ConnectionError | http.client.HTTPException):
            return DaemonError(f"{self.path}: the supervisor closed the connection before it answered")
        return DaemonError(f"{self.path}: {error}")
