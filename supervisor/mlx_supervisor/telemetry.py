"""The telemetry socket: workers' frames become events, and commands go back the same way.

An invalid frame is dropped and counted; drops are reported at a bounded rate.
"""

import asyncio
import hmac
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import zmq

from mlx_supervisor import wire
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.stderr import first_line, printable

MESSAGE_LIMIT_BYTES = 1024 * 1024
"""ZeroMQ disconnects a peer that sends a longer message; from `wire.FRAME_LIMIT_BYTES` on, frames are dropped here."""
QUEUE_FRAMES = 1000
TURN_FRAMES = 100
"""Frames read before other tasks of the event loop get a turn."""
DROP_REPORT_INTERVAL_S = 10.0

Receive = Callable[[str, ev.Event], None]
ReportDrops = Callable[[str, dict[str, int]], None]


@dataclass
class _Peer:
    run: str
    generation: int
    next_seq: int = 0


class Telemetry:
    """A ROUTER at `path`. `receive(run, event)` gets the reports of each run's expected worker.

    `report_drops(text, counts)` gets the latest error and the totals, at most once in `DROP_REPORT_INTERVAL_S`.
    """

    def __init__(self, path: Path, receive: Receive, report_drops: ReportDrops) -> None:
        self.address = f"ipc://{path}"
        self._receive = receive
        self._report_drops = report_drops
        self._expected: dict[tuple[str, int], str] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._reported_s = float("-inf")
        self._reported_frames = 0
        self._seq = 0
        self.dropped: Counter[str] = Counter()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_LIMIT_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(self.address)
            path.chmod(0o600)
        except BaseException:
            self._context.destroy(linger=0)  # the finalizer of a context with an open socket would block
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._on_readable)
        self._turn: asyncio.Handle | None = None

    def expect(self, run: str, generation: int, token: str) -> None:
        """A worker is about to start: from now on only a hello with this token is accepted for the run."""
        self.forget(run)
        self._expected[run, generation] = token

    def forget(self, run: str) -> None:
        """Accept no more frames for this run."""
        self._expected = {key: token for key, token in self._expected.items() if key[0] != run}
        self._peers = {identity: peer for identity, peer in self._peers.items() if peer.run != run}

    def send(self, run: str, kind: type[wire.Message], **fields: Any) -> str | None:
        """Queue a command for the run's worker. Returns None, or why it could not be sent."""
        identity, peer = next(((key, peer) for key, peer in self._peers.items() if peer.run == run), (b"", None))
        if peer is None:
            return "the worker has not connected yet"
        self._seq += 1
        frame = wire.encode(kind(run=run, generation=peer.generation, seq=self._seq, **fields))
        try:
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return str(error)
        finally:
            self._poll_soon()
        return None

    def close(self) -> None:
        """Close the socket; report drops since the last report."""
        if sum(self.dropped.values()) != self._reported_frames:
            self._report_drops("total", dict(self.dropped))
        self._loop.remove_reader(self._socket.FD)
        if self._turn is not None:
            self._turn.cancel()
        self._socket.close(0)
        self._context.term()

    def _poll_soon(self) -> None:
        """Poll again: the descriptor signals changes only, and a call to the socket may have consumed one."""
        if self._turn is None:
            self._turn = self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        for _ in range(TURN_FRAMES):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(parts)
            except wire.WireError as error:
                self._drop(error.kind, str(error))
        self._poll_soon()

    def _take(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            raise wire.WireError("malformed", f"{len(parts)} parts, expected 2")
        identity, frame = parts
        message = wire.decode_worker(frame)
        if isinstance(message, wire.Hello):
            self._greet(identity, message)
            return
        peer = self._peers.get(identity)
        if peer is None or (peer.run, peer.generation) != (message.run, message.generation):
            raise wire.WireError("stranger", f"{message.run!r} generation {message.generation} sent no hello")
        if message.seq < peer.next_seq:
            raise wire.WireError("sequence", f"{message.seq} repeated")
        self.dropped["lost"] += message.seq - peer.next_seq
        peer.next_seq = message.seq + 1
        self._receive(peer.run, event_of(message, time.monotonic()))

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        token = self._expected.get((hello.run, hello.generation))
        if token is None or not hmac.compare_digest(token.encode(), hello.token.encode()):
            raise wire.WireError("stranger", f"unexpected hello for {hello.run!r} generation {hello.generation}")
        if any((peer.run, peer.generation) == (hello.run, hello.generation) for peer in self._peers.values()):
            raise wire.WireError("stranger", f"second hello for {hello.run!r} generation {hello.generation}")
        self._peers = {key: peer for key, peer in self._peers.items() if peer.run != hello.run}
        self._peers[identity] = _Peer(hello.run, hello.generation, hello.seq + 1)

    def _drop(self, kind: str, text: str) -> None:
        self.dropped[kind] += 1
        now_s = time.monotonic()
        if now_s - self._reported_s >= DROP_REPORT_INTERVAL_S:
            self._reported_s = now_s
            self._reported_frames = sum(self.dropped.values())
            self._report_drops(text[:300], dict(self.dropped))


_EVENTS: dict[type[wire.Message], type[ev.WorkerEvent]] = {
    wire.Device: ev.DeviceFound,
    wire.Ready: ev.Ready,
    wire.Step: ev.StepReport,
    wire.Checkpoint: ev.CheckpointReport,
    wire.PhaseChange: ev.PhaseChange,
    wire.Validation: ev.ValidationReport,
    wire.Tested: ev.Tested,
    wire.Cleared: ev.Cleared,
    wire.AutopsyReport: ev.Autopsied,
    wire.Bye: ev.Bye,
}
"""Each message's event. An event takes the fields that it names from the message."""
_FIELDS = {kind: [(each.name, each.type) for each in fields(kind) if each.name != "at_s"] for kind in _EVENTS.values()}


def event_of(message: wire.Message, at_s: float) -> ev.Event:
    """The event of a worker's message other than a hello."""
    kind = _EVENTS[type(message)]
    return kind(at_s, **{name: _value(name, of, getattr(message, name)) for name, of in _FIELDS[kind]})


def _value(name: str, of: Any, value: Any) -> Any:
    """A field of a message as its event holds it: texts are made safe to print."""
    if of in (ev.Phase, ev.Outcome):
        return of(value)
    if isinstance(value, str):
        return printable(value).replace("\r", "\n") if name == "reason" else _line(value)
    if isinstance(value, dict):
        return {_line(key): each if each is not None and math.isfinite(each) else None for key, each in value.items()}
    return tuple(map(_element, value)) if isinstance(value, list) else value


def _element(value: str | wire.Finding | wire.Raised) -> str | ev.Raised:
    match value:
        case str():
            return _line(value)
        case wire.Finding():
            return _line(_finding_text(value))
        case wire.Raised():
            message = first_line(value.message)
            return ev.Raised(_line(value.kind), message, _line(value.file), value.line, _line(value.function))


def _line(text: str) -> str:
    """The text as one line without control characters, so that a terminal shows it and does not act on it."""
    return " ".join(printable(text).split())


def _finding_text(finding: wire.Finding) -> str:
    """In one line: what it is, how many there were and are, their size, and what refers to them."""
    if finding.kind == "note":
        return finding.what
    size = f", {finding.size_bytes / 2**20:,.1f} MiB" if finding.size_bytes else ""
    holder = f"; referenced by {finding.holder}" if finding.holder else ""
    return f"{finding.kind}: {finding.what}: {finding.count_before:,} → {finding.count_now:,}{size}{holder}"
