"""Runs a fine-tune in a subprocess, in the worker or in mlx_lm's loop, and times its steps."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zmq

from mlx_supervisor import wire

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training import jobs

SUPPORT = Path(__file__).resolve().parent
TIMEOUT_S = 400.0


@dataclass(frozen=True)
class Setup:
    """A model of `lora_task.SHAPES`, and its data. Steps up to `warm_up` are not timed."""

    shape: str = "llama"
    length: int = 64
    varied: bool = False
    count: int = 256
    batch: int = 4
    steps: int = 300
    warm_up: int = 50

    @property
    def data(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shape", "length", "varied", "count")}


@dataclass(frozen=True)
class Result:
    """`step_ms`: wall-clock time per step after the warm-up, checkpoints included. Bytes are MLX's counters."""

    step_ms: float
    peak_bytes: int
    cache_bytes: int
    losses: dict[int, float] = field(default_factory=dict, repr=False)
    checkpoints: int = 0
    weights_sha256: str | None = None


def mlx_lm(setup: Setup, every: int = 10, own_order: bool = False) -> Result:
    """Train with `mlx_lm.tuner.train`. Raises RuntimeError with the end of its stderr if it fails."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "result.json"
        done = subprocess.run(
            mlx_lm_command(setup, every, own_order), env=os.environ | {"BENCH_RESULT": str(file)}, check=False,
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"mlx_lm's loop ended with {done.returncode}: {done.stderr[-3000:]}")
        found = json.loads(file.read_text())
    at_s = {int(step): value for step, value in found["at_s"].items()}
    seconds = at_s[setup.steps] - at_s[setup.warm_up]
    return Result(
        1000 * seconds / (setup.steps - setup.warm_up), found["peak_bytes"], found["cache_bytes"],
        {int(step): value for step, value in found["losses"].items()},
    )  # fmt: skip


def worker(setup: Setup, memory: Mapping[str, Any] | None = None, checkpoint_every_s: float = 5.0) -> Result:
    """Train with the worker as the supervisor runs it, with telemetry and checkpoints."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        return generation(Path(name), setup, memory, {"every_seconds": checkpoint_every_s})


def generation(
    folder: Path,
    setup: Setup,
    memory: Mapping[str, Any] | None,
    checkpoint: Mapping[str, Any],
    number: int = 1,
    kill_at_step: int | None = None,
    deterministic: bool = False,
) -> Result:
    """One generation of the run in `folder`. Raises RuntimeError if it fails without `kill_at_step`."""
    with listening(folder, kill_at_step) as listener:
        command = worker_command(folder, setup, listener.endpoint, memory, checkpoint, number, deterministic)
        code = run_worker(folder, command, listener)
    if code != 0 and kill_at_step is None:
        raise RuntimeError(f"the worker ended with {code}: {(folder / 'output.log').read_text()[-3000:]}")
    return _result(listener, setup, whole=kill_at_step is None)


def run_worker(folder: Path, command: list[str], listener: "Listener", timeout_s: float = TIMEOUT_S) -> int:
    """Run the worker and receive all its messages; returns its exit code. Its output goes to `output.log`."""
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        listener.process = process
        try:
            code = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
    listener.drain()
    return code


def worker_command(
    folder: Path,
    setup: Setup,
    endpoint: str,
    memory: Mapping[str, Any] | None,
    checkpoint: Mapping[str, Any],
    generation: int = 1,
    deterministic: bool = False,
) -> list[str]:
    """The command that starts the worker. Writes its job file."""
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    task = {"base_dir": str(SUPPORT), "entry": "lora_task:build", "args": setup.data}
    job = jobs.job(
        run="bench", generation=generation, run_dir=str(run_dir), telemetry=endpoint, seed=7, steps=setup.steps,
        task=task, batch={"size": setup.batch}, memory=memory or {}, checkpoint=checkpoint, deterministic=deterministic,
    )  # fmt: skip
    (folder / "job.json").write_bytes(wire.dump_json(job))
    return [sys.executable, "-P", "-m", "mlx_worker", str(folder / "job.json")]


def mlx_lm_command(setup: Setup, every: int = 10, own_order: bool = False) -> list[str]:
    """The command that starts mlx_lm's loop, which writes its result to $BENCH_RESULT."""
    arguments = setup.data | {"batch": setup.batch, "steps": setup.steps, "every": every, "own_order": own_order}
    return [sys.executable, str(SUPPORT / "lora_task.py"), json.dumps(arguments)]


def _result(listener: "Listener", setup: Setup, whole: bool) -> Result:
    steps = listener.steps
    if not steps:
        raise RuntimeError("the worker reported no step")
    ms = float("nan")
    if whole and setup.warm_up in listener.at_s and setup.steps in listener.at_s:
        seconds = listener.at_s[setup.steps] - listener.at_s[setup.warm_up]
        ms = 1000 * seconds / (setup.steps - setup.warm_up)
    return Result(
        ms, max(step.peak_bytes for step in steps), max(step.cache_bytes for step in steps),
        {step.step: step.loss for step in steps}, listener.checkpoints, listener.weights_sha256,
    )  # fmt: skip


class Listener:
    """Receives the worker's frames in place of the supervisor, in a thread, and records their times of arrival."""

    def __init__(self, folder: Path, kill_at_step: int | None) -> None:
        self.endpoint = f"ipc://{folder}/t.sock"
        self.at_s: dict[int, float] = {}
        self.steps: list[wire.Step] = []
        self.checkpoints = 0
        self.weights_sha256: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._kill_at_step = kill_at_step
        self._ended = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Return once every message that was sent has been received."""
        self._ended.set()
        self._thread.join()

    def close(self) -> None:
        self.drain()
        self._socket.close(0)
        self._context.term()

    def _receive(self) -> None:
        while True:
            if not self._socket.poll(200):
                if self._ended.is_set():
                    return
                continue
            _, frame = self._socket.recv_multipart()
            now_s = time.perf_counter()
            self._record(wire.decode_worker(frame), now_s)

    def _record(self, message: wire.WorkerMessage, now_s: float) -> None:
        match message:
            case wire.Step():
                self.at_s[message.step] = now_s
                self.steps.append(message)
                if message.step == self._kill_at_step and self.process is not None:
                    self.process.kill()
            case wire.Checkpoint() if message.ok:
                self.checkpoints += 1
            case wire.Bye():
                self.weights_sha256 = message.weights_sha256


@contextlib.contextmanager
def listening(folder: Path, kill_at_step: int | None = None) -> Iterator[Listener]:
    """A listener on a socket in the folder."""
    listener = Listener(folder, kill_at_step)
    try:
        yield listener
    finally:
        listener.close()


def plain(result: Result) -> dict[str, Any]:
    """The result for JSON, without the losses."""
    return {name: value for name, value in asdict(result).items() if name != "losses"}
