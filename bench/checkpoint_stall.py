"""What checkpoints cost: how long training pauses for them, and steps per second with and without them, in pairs.

Trains a small Llama, with LoRA adapters and as a full fine-tune, with a checkpoint every few seconds. A pair is two
runs of the same steps, in alternating order: one with checkpoints and one without. The stall is measured by the worker.
The slow-down of the updates during a write is their time above the mean of the other updates of the same run: on a
shared machine that is more reliable than the difference between two runs.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from support import common

sys.path.insert(0, str(common.BENCH.parent))

from tests.training import jobs

from mlx_supervisor import wire

SHAPES = {
    "lora": {
        "base_dir": str(common.SUPPORT),
        "entry": "lora_task:build",
        "args": {"shape": "llama", "length": 64, "count": 256},
    },
    "full": {
        "base_dir": str(common.EXAMPLES),
        "entry": "first_run.stdlib_llama:build",
        "args": {"hidden": 128, "layers": 4, "length": 24},
    },
}
"""The full fine-tune has 4 MiB of weights and 8 MiB of optimizer state."""
TIMEOUT_S = 600.0
WARM_UP_STEPS = 20


@dataclass
class Generation:
    """Measured after the warm-up: `rate` in steps per second, fractions of the time, medians of one checkpoint."""

    rate: float
    stall_fraction: float
    slow_down_fraction: float
    checkpoints: int
    stall_ms: float
    write_ms: float
    size_mib: float


def train(folder: Path, shape: dict[str, Any], steps: int, batch: int, every_s: float) -> Generation:
    """One run of the worker in `folder`; `every_s` 0: only the final checkpoint. Raises RuntimeError if it fails."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{folder}/t.sock")
    job = jobs.job(
        run="bench", run_dir=str(folder), telemetry=f"ipc://{folder}/t.sock", seed=7, steps=steps, task=shape,
        batch={"size": batch}, checkpoint={"every_seconds": every_s},
    )  # fmt: skip
    (folder / "job.json").write_bytes(wire.dump_json(job))
    with (folder / "output.log").open("wb") as output:
        command = [sys.executable, "-P", "-m", "mlx_worker", str(folder / "job.json")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        messages = list(received(router, process))
    context.destroy(0)
    if process.returncode != 0:
        raise RuntimeError(f"the worker ended with {process.returncode}: {(folder / 'output.log').read_text()[-3000:]}")
    return measured(messages, steps)


def received(router: "zmq.Socket[bytes]", process: Any) -> Any:
    """Every message with its time of arrival, until the worker has ended."""
    until_s = time.perf_counter() + TIMEOUT_S
    while time.perf_counter() < until_s:
        if router.poll(200):
            frame = router.recv_multipart()[1]
            yield time.perf_counter(), wire.decode_worker(frame)
        elif process.poll() is not None:
            return
    process.kill()
    process.wait()


def measured(messages: list[tuple[float, Any]], steps: int) -> Generation:
    """Rates and costs from the end of the warm-up to the last step, without the final checkpoint."""
    at_s = {message.step: came_s for came_s, message in messages if isinstance(message, wire.Step)}
    last_s = at_s[steps]
    saved = [m for came_s, m in messages if isinstance(m, wire.Checkpoint) and came_s <= last_s and m.step < steps]
    seconds = last_s - at_s[WARM_UP_STEPS]
    return Generation(
        rate=(steps - WARM_UP_STEPS) / seconds,
        stall_fraction=sum(message.stall_s for message in saved) / seconds,
        slow_down_fraction=slow_down_s(messages, saved) / seconds,
        checkpoints=len(saved),
        stall_ms=1000 * statistics.median([message.stall_s for message in saved] or [0.0]),
        write_ms=1000 * statistics.median([message.seconds for message in saved] or [0.0]),
        size_mib=max([message.size_bytes for message in saved] or [0]) / common.MIB,
    )


def slow_down_s(messages: list[tuple[float, Any]], saved: list[Any]) -> float:
    """Total extra seconds of the updates during which a checkpoint was written.

    The update before each write counts, too: the snapshot waits for it, which shifts time between it and the next one.
    """
    updates = [(s, m.step, m.seconds) for s, m in messages if isinstance(m, wire.Step) and m.step > WARM_UP_STEPS]
    snapshot_steps = {one.step for one in saved}
    at_s = {step: came_s for came_s, step, _ in updates}
    writes = [(at_s[one.step], at_s[one.step] + one.seconds) for one in saved if one.step in at_s]

    def during_write(came_s: float, seconds: float) -> bool:
        return any(came_s - seconds < end_s and came_s > begin_s for begin_s, end_s in writes)

    busy, calm = [], []
    for came_s, step, seconds in updates:
        slowed = step in snapshot_steps or during_write(came_s, seconds)
        (busy if slowed else calm).append(seconds)
    return sum(busy) - len(busy) * statistics.mean(calm) if calm else 0.0


def pair(number: int, shape: dict[str, Any], steps: int, batch: int, every_s: float) -> tuple[Generation, Generation]:
    """The run with checkpoints, and the one without."""
    runs: dict[float, Generation] = {}
    for each_s in (every_s, 0.0) if number % 2 else (0.0, every_s):
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
            runs[each_s] = train(Path(name), shape, steps, batch, each_s)
    return runs[every_s], runs[0.0]


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each kind")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between checkpoints")
    options = parser.parse_args()
    rows, results = [], {}
    for kind, shape in SHAPES.items():
        pairs = []
        for number in range(options.pairs):
            pairs.append(pair(number, shape, options.steps, options.batch, options.every_s))
            print(f"{kind} {number + 1}/{options.pairs}: {pairs[-1][0]}", file=sys.stderr)
        rows.append(row(kind, pairs))
        results[kind] = [[vars(run) for run in both] for both in pairs]
    header = ["", "MiB", "checkpoints", "write ms", "stall ms", "stall %", "slower %", "steps/s", "without", "ratio"]
    common.table(header, rows)
    print("Medians over the pairs. A ratio above 1 is noise.")
    common.write(options.json, {"every_s": options.every_s, "steps": options.steps, "pairs": results})


def row(kind: str, pairs: list[tuple[Generation, Generation]]) -> list[object]:
    """A row of the table: medians over the pairs."""

    def median(values: Any) -> float:
        return statistics.median(list(values))

    return [
        kind,
        median(run.size_mib for run, _ in pairs),
        int(median(run.checkpoints for run, _ in pairs)),
        median(run.write_ms for run, _ in pairs),
        median(run.stall_ms for run, _ in pairs),
        median(100 * run.stall_fraction for run, _ in pairs),
        median(100 * run.slow_down_fraction for run, _ in pairs),
        median(run.rate for run, _ in pairs),
        median(bare.rate for _, bare in pairs),
        f"{median(run.rate / bare.rate for run, bare in pairs):.4f}",
    ]


if __name__ == "__main__":
    main()
