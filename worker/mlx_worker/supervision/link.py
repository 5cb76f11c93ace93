"""The worker's end of the telemetry socket. It never blocks training: what cannot be sent is dropped and counted."""

import os
import time
from importlib import metadata
from typing import Any

from mlx_supervisor import wire

SEND_QUEUE_FRAMES = 1000
RECEIVE_QUEUE_FRAMES = 100
LINGER_MS = 500
"""At close, how long unsent frames may still go out."""
PRINT_INTERVAL_S = 1.0
_TEXT_LIMITS = {"reason": 4096, "error": 4096, "detail": 512, "checkpoint": 512, "versions": 512}
_LIST_LIMIT = 16
_ITEM_LIMIT_BYTES = 512


class Link:
    """Sends messages with a growing `seq`, and collects commands. To be used by the main thread only.

    Without an endpoint (a bare run) it prints a step now and then, and swallows the rest. `dropped` counts frames that
    could not be sent, `garbage` frames that were no command. `last_step` and `last_loss` are of the last step sent.
    """

    def __init__(self, run: str, generation: int, endpoint: str | None) -> None:
        self._run, self._generation, self._seq = run, generation, 0
        self.dropped = 0
        self.garbage = 0
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
        """Say who this is. The token comes from the environment."""
        versions = ", ".join(f"{name} {version_of(name)}" for name in ("mlx", "mlx-lm", "mlx-supervisor"))
        self.send(wire.Hello, pid=os.getpid(), token=os.environ.get(wire.TOKEN_VARIABLE, "")[:128], versions=versions)

    def phase(self, name: wire.PhaseName, detail: str = "") -> None:
        """Report the phase that the worker is in."""
        self.current_phase = name
        self.send(wire.PhaseChange, phase=name, detail=detail)

    def send(self, kind: type[wire.Message], **fields: Any) -> None:
        """Send, or drop and count. Texts are cut to what the wire allows."""
        if kind is wire.Step:
            self.last_step, self.last_loss = fields["step"], fields["loss"]
        if self._socket is None:
            self._print(kind, fields)
            return
        import zmq

        message = kind(run=self._run, generation=self._generation, seq=self._seq, **_cut(fields))
        self._seq += 1
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except (zmq.ZMQError, wire.WireError):
            self.dropped += 1

    def _print(self, kind: type[wire.Message], fields: dict[str, Any]) -> None:
        """A bare run has nobody to report to but the terminal: a step a second is enough there."""
        now_s = time.monotonic()
        if kind is wire.Step and now_s - self._printed_s >= PRINT_INTERVAL_S:
            self._printed_s = now_s
            mib = fields["resident_bytes"] / 2**20
            print(f"step {fields['step']} loss={fields['loss']:.4f} resident={mib:,.0f} MiB", flush=True)

    def receive(self) -> list[wire.SupervisorMessage]:
        """The commands that have come, of this run and generation; at most as many as the queue holds."""
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
            if command is None:
                self.garbage += 1
            else:
                commands.append(command)
        return commands

    def _decode(self, frames: list[bytes]) -> wire.SupervisorMessage | None:
        if len(frames) != 1:
            return None
        try:
            command = wire.decode_supervisor(frames[0])
        except wire.WireError:
            return None
        ours = command.run == self._run and command.generation == self._generation
        return command if ours else None

    def close(self) -> None:
        """Give what is still queued half a second, then close."""
        if self._socket is not None:
            self._socket.close()
            self._context.term()
            self._socket = None


def _cut(fields: dict[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        if isinstance(value, str) and name in _TEXT_LIMITS:
            fields[name] = value[: _TEXT_LIMITS[name]]
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            # In bytes: 32 items of 512 characters of four bytes each would be over the frame's limit.
            fields[name] = [item.encode()[:_ITEM_LIMIT_BYTES].decode(errors="ignore") for item in value[:_LIST_LIMIT]]
    return fields


def version_of(package: str) -> str:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
