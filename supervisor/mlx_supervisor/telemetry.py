"""The workers' frames: received, checked, counted, and turned into events. Commands go back the same way.

A frame that is no good is counted, said at a bounded rate, and dropped; nothing in it is believed.
"""

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from mlx_supervisor import wire
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.stderr import first_line, printable

MESSAGE_LIMIT_BYTES = 1024 * 1024
"""ZeroMQ itself cuts off a peer that sends more; between this and `wire.FRAME_LIMIT_BYTES` frames are counted."""
QUEUE_FRAMES = 1000
TURN_FRAMES = 100
"""Frames read before everybody else gets a turn."""
COMPLAINT_INTERVAL_S = 10.0

Receive = Callable[[str, ev.Event], None]
Complain = Callable[[str, dict[str, int]], None]


@dataclass
class _Peer:
    run: str
    generation: int
    next_seq: int = 0


class Telemetry:
    """A ROUTER at `path`. `receive(run, event)` gets what a known worker of the expected generation says.

    `complain(text, counts)` is told of dropped frames, at most once in `COMPLAINT_INTERVAL_S`.
    """

    def __init__(self, path: Path, receive: Receive, complain: Complain) -> None:
        self.address = f"ipc://{path}"
        self._receive = receive
        self._complain = complain
        self._expected: dict[tuple[str, int], str] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._complained_s = float("-inf")
        self._complained_frames = 0
        self._seq = 0
        self.dropped: Counter[str] = Counter()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_LIMIT_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        path.unlink(missing_ok=True)
        self._socket.bind(self.address)
        path.chmod(0o600)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._on_readable)
        self._turn: asyncio.Handle | None = None

    def expect(self, run: str, generation: int, token: str) -> None:
        """A worker is about to start: only a hello with this token speaks for the run from now on."""
        self.forget(run)
        self._expected[run, generation] = token

    def forget(self, run: str) -> None:
        """Nobody speaks for this run any more."""
        self._expected = {key: token for key, token in self._expected.items() if key[0] != run}
        self._peers = {identity: peer for identity, peer in self._peers.items() if peer.run != run}

    def send(self, run: str, kind: type[wire.Message], **fields: Any) -> str | None:
        """Send a command to the run's worker. None when it is under way, else why it could not be sent."""
        identity, peer = next(((key, peer) for key, peer in self._peers.items() if peer.run == run), (b"", None))
        if peer is None:
            return "the worker has not said hello"
        self._seq += 1
        frame = wire.encode(kind(run=run, generation=peer.generation, seq=self._seq, **fields))
        try:
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return str(error)
        finally:
            self._look_again()
        return None

    def close(self) -> None:
        """Stop listening; say how many frames were dropped since the last complaint."""
        if sum(self.dropped.values()) != self._complained_frames:
            self._complain("in all", dict(self.dropped))
        self._loop.remove_reader(self._socket.FD)
        if self._turn is not None:
            self._turn.cancel()
        self._socket.close(0)
        self._context.term()

    def _look_again(self) -> None:
        """The descriptor tells of changes only: whoever may have used one up has to look whether frames wait."""
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
        self._look_again()

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
            raise wire.WireError("stranger", f"{message.run!r} generation {message.generation} without a hello")
        if message.seq < peer.next_seq:
            raise wire.WireError("sequence", f"{message.seq} again")
        self.dropped["lost"] += message.seq - peer.next_seq
        peer.next_seq = message.seq + 1
        self._receive(peer.run, _event_of(message, time.monotonic()))

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        token = self._expected.get((hello.run, hello.generation))
        if token is None or not hmac.compare_digest(token.encode(), hello.token.encode()):
            raise wire.WireError("stranger", f"a hello for {hello.run!r} that was not expected")
        self._peers = {key: peer for key, peer in self._peers.items() if peer.run != hello.run}
        self._peers[identity] = _Peer(hello.run, hello.generation, hello.seq + 1)

    def _drop(self, kind: str, text: str) -> None:
        self.dropped[kind] += 1
        now_s = time.monotonic()
        if now_s - self._complained_s >= COMPLAINT_INTERVAL_S:
            self._complained_s = now_s
            self._complained_frames = sum(self.dropped.values())
            self._complain(text[:300], dict(self.dropped))


def _event_of(message: wire.WorkerMessage, at_s: float) -> ev.Event:
    generation = message.generation
    match message:
        case wire.Ready():
            return ev.Ready(
                at_s,
                generation,
                message.step,
                message.target_steps,
                message.batch_size,
                message.effective_batch,
                None if message.checkpoint is None else _line(message.checkpoint),
                tuple(_line(each) for each in message.passed_over),
                tuple(_line(each) for each in message.notes),
                message.gradient_checkpointing,
                message.can_checkpoint_gradients,
            )
        case wire.Step():
            return _step_of(message, at_s)
        case wire.Checkpoint():
            return ev.CheckpointReport(
                at_s,
                generation,
                message.step,
                message.ok,
                message.seconds,
                message.stall_s,
                message.size_bytes,
                _line(message.error),
            )
        case wire.PhaseChange():
            return ev.PhaseChange(at_s, generation, ev.Phase(message.phase), _line(message.detail))
        case wire.Cleared():
            return ev.Cleared(at_s, generation, message.active_bytes, message.cache_bytes)
        case wire.AutopsyReport():
            return _autopsied(message, at_s)
        case wire.Bye():
            return _bye_of(message, at_s)
        case wire.Hello():
            raise AssertionError("a hello is no event")


def _line(text: str) -> str:
    """One line that a terminal shows and does not obey."""
    return " ".join(printable(text).split())


def _autopsied(message: wire.AutopsyReport, at_s: float) -> ev.Autopsied:
    findings = tuple(_line(_finding_text(finding)) for finding in message.findings)
    return ev.Autopsied(at_s, message.generation, message.step, findings, message.seconds, message.complete)


def _finding_text(finding: wire.Finding) -> str:
    """In one line: what it is, how many there were and are, their size, and who holds them."""
    if finding.kind == "note":
        return finding.what
    size = f", {finding.size_bytes / 2**20:,.1f} MiB" if finding.size_bytes else ""
    held = f"; held by {finding.holder}" if finding.holder else ""
    return f"{finding.kind}: {finding.what}: {finding.count_before} then, {finding.count_now} now{size}{held}"


def _bye_of(message: wire.Bye, at_s: float) -> ev.Bye:
    errors = tuple(
        ev.Raised(_line(each.kind), first_line(each.message), _line(each.file), each.line, _line(each.function))
        for each in message.errors
    )
    outcome, reason = ev.Outcome(message.outcome), printable(message.reason).replace("\r", "\n")
    return ev.Bye(at_s, message.generation, outcome, reason, message.step, message.loss, message.weights_sha256, errors)


def _step_of(message: wire.Step, at_s: float) -> ev.StepReport:
    return ev.StepReport(
        at_s=at_s,
        generation=message.generation,
        step=message.step,
        loss=message.loss,
        tokens=message.tokens,
        samples=message.samples,
        learning_rate=message.learning_rate,
        seconds=message.seconds,
        batch_size=message.batch_size,
        accumulation=message.accumulation,
        active_bytes=message.active_bytes,
        cache_bytes=message.cache_bytes,
        peak_bytes=message.peak_bytes,
        resident_bytes=message.resident_bytes,
        phase=ev.Phase(message.phase),
    )
