"""The telemetry socket against unknown peers, forged frames and floods."""

import asyncio
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from msgspec.msgpack import encode as peer_encode
from tests.process import harness

from mlx_supervisor import wire
from mlx_supervisor.core import events as ev
from mlx_supervisor.telemetry import Telemetry

FRAMES = 100_000
TOKEN = "a" * 32


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path, whatever the temporary folder is called."""
    path = Path(tempfile.mkdtemp(prefix="mlxs"))
    yield path
    shutil.rmtree(path)


class Listener:
    def __init__(self) -> None:
        self.events: list[tuple[str, ev.Event]] = []
        self.complaints: list[str] = []


@asynccontextmanager
async def listening(folder: Path) -> AsyncIterator[tuple[Telemetry, Listener]]:
    received = Listener()
    telemetry = Telemetry(
        folder / "telemetry.sock",
        lambda run, event: received.events.append((run, event)),
        lambda text, _: received.complaints.append(text),
    )
    try:
        yield telemetry, received
    finally:
        telemetry.close()


class Peer:
    """A worker, or a program that claims to be one."""

    def __init__(self, address: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, **fields: Any) -> None:
        self.socket.send(peer_encode({"v": 1, "run": "run", "generation": 1, **fields}))

    def hello(self, **fields: Any) -> None:
        self.send(**{"type": "hello", "seq": 0, "pid": 1, "token": TOKEN, **fields})

    def phase(self, seq: int, **fields: Any) -> None:
        self.send(**{"type": "phase", "seq": seq, "phase": "train", **fields})


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_only_frames_of_the_expected_worker_are_accepted(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            stranger, liar, worker = (Peer(telemetry.address) for _ in range(3))
            stranger.phase(1)
            liar.hello(token="b" * 32)
            liar.phase(1)
            await until(lambda: telemetry.dropped["stranger"] == 3)
            worker.hello()
            worker.phase(1)
            worker.phase(1)  # the same sequence number again
            worker.phase(2, generation=2)
            worker.phase(3, run="other")
            worker.phase(5)
            await until(lambda: len(received.events) == 2)
            assert telemetry.dropped["sequence"] == 1
            assert telemetry.dropped["stranger"] == 5
            assert telemetry.dropped["lost"] == 3
            assert received.complaints  # reported once, not for every frame
            assert len(received.complaints) == 1

    asyncio.run(scenario())


def test_after_a_new_hello_frames_of_the_old_generation_are_dropped(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            old = Peer(telemetry.address)
            old.hello()
            old.phase(1)
            await until(lambda: len(received.events) == 1)
            telemetry.expect("run", 2, "c" * 32)
            old.phase(2)
            await until(lambda: telemetry.dropped["stranger"] == 1)
            assert len(received.events) == 1
            assert telemetry.send("run", wire.ClearCache) == "the worker has not connected yet"

    asyncio.run(scenario())


STEP = {
    "step": 7, "loss": 0.5, "tokens": 64, "samples": 8, "learning_rate": 1e-4, "seconds": 0.25, "batch_size": 4,
    "accumulation": 2, "active_bytes": 1, "cache_bytes": 2, "phase": "eval", "metrics": {"accuracy": 0.75},
    "peak_bytes": 3, "device_limit_bytes": 2**35, "device_free_bytes": 2**36, "process_bytes": 3,
}  # fmt: skip


def test_a_message_becomes_an_event_field_by_field(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            worker = Peer(telemetry.address)
            worker.hello()
            worker.send(type="step", seq=1, dropped=9, resident_bytes=4, **STEP)
            worker.send(type="cleared", seq=2, active_bytes=5, cache_bytes=6)
            worker.send(type="bye", seq=3, outcome="stopped", reason="a\r\nb", step=7, loss=0.5)
            worker.phase(4, detail="batch 3")
            await until(lambda: len(received.events) == 4)
            step, cleared, bye, phase = (event for _, event in received.events)
            assert isinstance(step, ev.StepReport)
            assert asdict(step) == STEP | {"generation": 1, "at_s": step.at_s}
            assert step.phase is ev.Phase.EVAL
            assert cleared == ev.Cleared(cleared.at_s, 1, 5, 6)
            assert isinstance(bye, ev.Bye)
            assert (bye.outcome, bye.reason, bye.loss) == (ev.Outcome.STOPPED, "a\n\nb", 0.5)
            assert bye.outcome is ev.Outcome.STOPPED
            assert phase == ev.PhaseChange(phase.at_s, 1, ev.Phase.TRAIN, "batch 3")

    asyncio.run(scenario())


NOTE = {"kind": "note"}
HOSTILE = "\x1b]0;title\x07\x1b[2Jfirst\r\n12:00:00  Completed.\x00\x7f\x85\u2028\u202e end"


def test_what_a_worker_says_cannot_move_a_terminal_or_look_like_another_line(folder: Path) -> None:
    finding = {"kind": "objects", "what": HOSTILE, "holder": HOSTILE}
    step = {"step": 1, "target_steps": 9, "batch_size": 1, "effective_batch": 1}

    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            worker = Peer(telemetry.address)
            worker.hello()
            worker.send(type="ready", seq=1, checkpoint=HOSTILE, notes=[HOSTILE], skipped=[HOSTILE], **step)
            worker.send(type="autopsy", seq=2, step=1, seconds=0.1, findings=[finding])
            worker.send(type="autopsy", seq=3, step=1, seconds=0.1, findings=[finding | NOTE])
            worker.send(type="checkpoint", seq=4, step=1, ok=False, seconds=1, stall_s=1, size_bytes=1, error=HOSTILE)
            raised = {"kind": HOSTILE, "message": "\r\n" + HOSTILE, "file": HOSTILE, "line": 3, "function": HOSTILE}
            worker.send(type="bye", seq=5, outcome="failed", reason=HOSTILE, step=1, loss=None, errors=[raised])
            await until(lambda: len(received.events) == 5)
            ready, grown, noted, saved, bye = (event for _, event in received.events)
            assert isinstance(ready, ev.Ready)
            assert isinstance(grown, ev.Autopsied)
            assert isinstance(noted, ev.Autopsied)
            assert isinstance(saved, ev.CheckpointReport)
            assert isinstance(bye, ev.Bye)
            texts = [str(ready.checkpoint), *ready.notes, *ready.skipped, *grown.findings, *noted.findings]
            (error,) = bye.errors
            assert (error.line, error.message) == (3, "first")
            of_error = [error.kind, error.message, error.file, error.function]
            for text in [*texts, *of_error, saved.error, *bye.reason.split("\n")]:
                assert text.isprintable(), ascii(text)
            assert all("first" in text and "end" in text for text in texts)

    asyncio.run(scenario())


def test_a_command_reaches_the_worker_and_a_dead_one_is_noticed(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            worker = Peer(telemetry.address)
            worker.hello()
            worker.phase(1)
            await until(lambda: received.events)
            assert telemetry.send("run", wire.Stop, reason="because") is None
            command = wire.decode_supervisor(await asyncio.to_thread(worker.socket.recv))
            assert isinstance(command, wire.Stop)
            assert command.reason == "because"
            worker.socket.close()
            await until(lambda: telemetry.send("run", wire.Stop) is not None)

    asyncio.run(scenario())


def test_the_socket_is_the_owners_alone(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder):
            assert oct((folder / "telemetry.sock").stat().st_mode)[-3:] == "600"

    asyncio.run(scenario())


def hostile_frames(count: int, seed: int) -> Iterator[list[bytes]]:
    """Random, truncated, oversized, wrongly typed and badly split frames."""
    rng = random.Random(seed)
    good = peer_encode({"type": "hello", "v": 1, "run": "run", "generation": 1, "seq": 0, "pid": 1, "token": TOKEN})
    step = {"type": "step", "v": 1, "run": "run", "generation": 1, "seq": 1, "step": 10**6, "loss": 0.0}
    kinds = [
        lambda: [rng.randbytes(rng.randrange(200))],
        lambda: [good[: rng.randrange(len(good))]],
        lambda: [peer_encode({**step, "step": rng.choice(["1", None, -1, 1.5, [1], {}, 2**63])})],
        lambda: [peer_encode({**step, "v": rng.choice([0, 2, "1", None, 10**9])})],
        lambda: [peer_encode({"type": rng.choice(["bye", "nonsense", 7]), "v": 1, "run": "x" * 1000})],
        lambda: [b"\x91" * rng.randrange(5000)],
        lambda: [struct.pack(">BI", 0xDD, 2**32 - 1)],
        lambda: [good, good, good],
        lambda: [b""],
    ]
    for number in range(count):
        yield [bytes(wire.FRAME_LIMIT_BYTES + 1)] if number % 1000 == 0 else rng.choice(kinds)()


def test_a_hundred_thousand_hostile_frames_do_not_disturb_a_run(folder: Path) -> None:
    settings = harness.write_settings(folder, args={"delay_s": 0.01}, steps=1_000_000)
    with harness.Foreground(settings) as foreground:
        foreground.until("Ready")
        supervisor = psutil.Process(foreground.process.pid)
        address = f"ipc://{folder / 'state/telemetry.sock'}"
        _flood(address, FRAMES // 10, seed=1)
        before_bytes = supervisor.memory_info().rss
        before_steps = harness.journaled_steps(folder)
        _flood(address, FRAMES, seed=2)
        harness.eventually(lambda: harness.journaled_steps(folder) > before_steps + 20)
        grown = supervisor.memory_info().rss - before_bytes
        assert grown < 4 * 2**20, f"grew by {grown / 2**20:.1f} MiB"
        os.kill(foreground.process.pid, 0)  # raises when it is dead
        harness.interrupt(foreground)
        assert foreground.wait() == 130
    summary = foreground.summary()
    assert summary["outcome"] == "stopped"
    assert summary["step"] < 1_000_000
    assert len(summary["generations"]) == 1
    records = [json.loads(line) for line in (folder / "state/supervisor.log").read_text().splitlines()]
    complaints = [record for record in records if record["event"] == "frames_dropped"]
    assert 1 <= len(complaints) < 30
    dropped = {key: value for key, value in complaints[-1].items() if key.startswith("dropped_")}
    assert sum(dropped.values()) - dropped["dropped_lost"] == FRAMES // 10 + FRAMES
    assert dropped["dropped_oversized"] >= FRAMES // 1000


def _flood(address: str, count: int, seed: int) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDTIMEO, 20_000)
    socket.connect(address)
    for parts in hostile_frames(count, seed):
        socket.send_multipart(parts)
    socket.close(linger=20_000)
    context.term()


def test_a_second_hello_does_not_replace_the_worker(folder: Path) -> None:
    async def scenario() -> None:
        async with listening(folder) as (telemetry, received):
            telemetry.expect("run", 1, TOKEN)
            worker, forger = Peer(telemetry.address), Peer(telemetry.address)
            worker.hello()
            worker.send(type="phase", seq=1, phase="load")
            while not received.events:
                await asyncio.sleep(0.01)
            forger.hello()
            forger.send(type="checkpoint", seq=1, step=390, ok=True, seconds=0.1, stall_s=0.0, size_bytes=1)
            while telemetry.dropped["stranger"] < 2:
                await asyncio.sleep(0.01)
            assert telemetry.send("run", wire.ClearCache) is None
            assert await asyncio.to_thread(worker.socket.poll, 5000)
            assert len(received.events) == 1

    asyncio.run(asyncio.wait_for(scenario(), 20))
