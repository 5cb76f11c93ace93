"""The worker's end of the telemetry socket. It never blocks training: unsent messages are dropped and counted."""

import os
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from msgspec import inspect

from mlx_supervisor import wire

SEND_QUEUE_FRAMES = 1000
RECEIVE_QUEUE_FRAMES = 100
LINGER_MS = 500
"""How long unsent frames are kept for sending after the close."""
PRINT_INTERVAL_S = 1.0
_LIST_LIMIT = 16
_ITEM_LIMIT_BYTES = 512


class Link:
    """Sends messages with a growing `seq` and receives commands. Use it from the main thread only.

    Without an endpoint (a bare run) it prints about a step a second and discards other messages. `dropped` counts
    unsent frames. `last_step`, `last_loss`: of the last step sent. `on_step` is called with the number of every step,
    `on_bye` with the last message before it is sent.
    """

    def __init__(self, run: str, generation: int, endpoint: str | None) -> None:
        self._run, self._generation, self._seq = run, generation, 0
        self.dropped = 0
        self.on_step: Callable[[int], None] = lambda step: None
        self.on_bye: Callable[[wire.Bye], None] = lambda message: None
        self._target_steps = 0
        self.last_step = 0
        self.last_loss: float | None = None
        self.current_phase: wire.PhaseName = "load"
        self._printed_s = float("-inf")
        self._context: Any = None
        self._socket: Any = None
        if endpoint is not None:
            self._connect(endpoint)

    def _connect(self, endpoint: str) -> None:
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_FRAMES)
        self._socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_FRAMES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(endpoint)

    def hello(self) -> None:
        """Identify this worker. The token comes from the environment."""
        self.send(wire.Hello, pid=os.getpid(), token=os.environ.get(wire.TOKEN_VARIABLE, ""))

    def phase(self, name: wire.PhaseName, detail: str = "", waiting_for: str = "") -> None:
        """Report the worker's phase. `waiting_for`: what it lacks to save or export its finished work."""
        self.current_phase = name
        self.send(wire.PhaseChange, phase=name, detail=detail, waiting_for=waiting_for)

    def send(self, kind: type[wire.Message], **fields: Any) -> None:
        """Send, or drop and count. Texts are shortened to the wire's limits."""
        if kind is wire.Step:
            self.last_step = fields["step"]
            self.on_step(self.last_step)
            self.last_loss = self.last_loss if fields["loss"] is None else fields["loss"]
        elif kind is wire.Ready:
            self._target_steps = fields["target_steps"]
        elif kind is wire.Bye:
            fields["target_steps"] = self._target_steps
        if self._socket is None:
            self._print(kind, fields)
            return
        import zmq

        message = kind(run=self._run, generation=self._generation, seq=self._seq, **_shortened(kind, fields))
        self._seq += 1
        if isinstance(message, wire.Bye):
            self.on_bye(message)
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except (zmq.ZMQError, wire.WireError):
            self.dropped += 1

    def _print(self, kind: type[wire.Message], fields: dict[str, Any]) -> None:
        """Print a step, at most one a second."""
        now_s = time.monotonic()
        if kind is wire.Step and now_s - self._printed_s >= PRINT_INTERVAL_S:
            self._printed_s = now_s
            mib = fields["resident_bytes"] / 2**20
            loss = "no tokens" if fields["loss"] is None else f"loss={fields['loss']:.4f}"
            print(f"step {fields['step']} {loss} resident={mib:,.0f} MiB", flush=True)

    def receive(self) -> list[wire.SupervisorMessage]:
        """The commands received for this run and generation; at most as many as the queue holds."""
        commands: list[wire.SupervisorMessage] = []
        if self._socket is None:
            return commands
        import zmq

        for _ in range(RECEIVE_QUEUE_FRAMES):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            command = self._decode(frames)
            if command is not None:  # what is no command is dropped
                commands.append(command)
        return commands

    def _decode(self, frames: list[bytes]) -> wire.SupervisorMessage | None:
        if len(frames) != 1:
            return None
        try:
            command = wire.decode_supervisor(frames[0])
        except wire.WireError:
            return None
        expected = command.run == self._run and command.generation == self._generation
        return command if expected else None

    def close(self) -> None:
        """Send queued frames for at most half a second, then close."""
        if self._socket is not None:
            self._socket.close()
            self._context.term()
            self._socket = None


@cache
def _text_limits(kind: type[wire.Message]) -> dict[str, int]:
    """How many characters each text of a message may have."""
    fields = ((each.name, each.type) for each in inspect.type_info(kind).fields)  # type: ignore[attr-defined]
    texts = ((name, text) for name, of in fields for text in getattr(of, "types", (of,)))
    return {name: text.max_length for name, text in texts if isinstance(text, inspect.StrType) and text.max_length}


def _shortened(kind: type[wire.Message], fields: dict[str, Any]) -> dict[str, Any]:
    limits = _text_limits(kind)
    for name, value in fields.items():
        if isinstance(value, str) and name in limits:
            fields[name] = value[: limits[name]].encode(errors="replace").decode()
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            fields[name] = [_item(text) for text in value[:_LIST_LIMIT]]
    return fields


def _item(text: str) -> str:
    """Its first 512 bytes: 32 items of 512 four-byte characters would exceed the frame's limit."""
    return text.encode(errors="replace")[:_ITEM_LIMIT_BYTES].decode(errors="ignore")


def version_of(package: str) -> str:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
