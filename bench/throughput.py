"""The worker's training loop against mlx_lm's on this machine, in alternating slices of one second.

Both run the same LoRA fine-tune of a tiny Llama, with the same samples in the same batches. The worker runs as under
the supervisor, with telemetry and a checkpoint every 5 s of wall-clock time, which includes mlx_lm's slices.
mlx_lm.tuner.train runs with its defaults and saves no state. The first updates are not timed. A ratio above 1 means
that the worker is faster.
"""

import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from support import common, paired, slices

WARM_UP_STEPS = 60
ENDLESS_STEPS = 1_000_000


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of slices for each kind of data")
    parser.add_argument("--slice-s", type=float, default=1.0, help="seconds of a slice")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample; if varied, of the longest")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", choices=["fixed", "varied"], help="only this kind of data")
    options = parser.parse_args()
    results = {}
    for kind in [options.only] if options.only else ["fixed", "varied"]:
        setup = paired.Setup(
            length=options.length, varied=kind == "varied", batch=options.batch, steps=ENDLESS_STEPS, warm_up=0
        )
        results[kind] = measure(kind, setup, options.pairs, options.slice_s)
    common.table(
        ["data", "pairs", "worker steps/s", "mlx_lm steps/s", "median ratio", "95 % interval", "worker CPU ms/step",
         "mlx_lm CPU ms/step"],
        [
            [kind, len(found["pairs"]), f"{found['worker_per_s']:.2f}", f"{found['mlx_lm_per_s']:.2f}",
             f"{found['median_ratio']:.3f}", "{:.3f} to {:.3f}".format(*found["interval"]),
             found["worker_cpu_ms"], found["mlx_lm_cpu_ms"]]
            for kind, found in results.items()
        ],
    )  # fmt: skip
    common.write(options.json, {"slice_s": options.slice_s, **results})


def measure(kind: str, setup: paired.Setup, count: int, slice_s: float) -> dict[str, Any]:
    """All pairs of slices, and the median of their ratios. The order alternates from pair to pair."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, paired.listening(Path(name)) as listener:
        folder = Path(name)
        command = paired.worker_command(folder, setup, listener.endpoint, None, {"every_seconds": 5.0})
        result = {"BENCH_RESULT": os.devnull}
        worker = slices.Contestant("worker", command, folder, {})
        mlx_lm = slices.Contestant("mlx_lm", paired.mlx_lm_command(setup), folder, result)
        with slices.taking_turns(worker, mlx_lm):
            worker.run_to(WARM_UP_STEPS, paired.TIMEOUT_S)
            mlx_lm.run_to(WARM_UP_STEPS, paired.TIMEOUT_S)
            pairs = []
            for number in range(count):
                turns = [worker, mlx_lm] if number % 2 == 0 else [mlx_lm, worker]
                found = {one.name: one.run_slice(slice_s) for one in turns}
                pairs.append({**found, "ratio": found["worker"] / found["mlx_lm"]})
                print(
                    f"{kind} {number + 1}/{count}: worker {found['worker']:.2f} steps/s, mlx_lm {found['mlx_lm']:.2f}, "
                    f"ratio {pairs[-1]['ratio']:.3f}", flush=True,
                )  # fmt: skip
    print(f"{kind}: {listener.checkpoints} checkpoints, {len(listener.steps)} updates reported", flush=True)
    ratios = [pair["ratio"] for pair in pairs]
    return {
        "setup": vars(setup), "pairs": pairs, "checkpoints": listener.checkpoints,
        "worker_per_s": statistics.median(pair["worker"] for pair in pairs),
        "mlx_lm_per_s": statistics.median(pair["mlx_lm"] for pair in pairs),
        "median_ratio": statistics.median(ratios), "interval": interval(ratios),
        "worker_cpu_ms": 1000 * worker.cpu_s / worker.batches, "mlx_lm_cpu_ms": 1000 * mlx_lm.cpu_s / mlx_lm.batches,
    }  # fmt: skip


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap confidence interval of the median."""
    generator = random.Random(1)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


if __name__ == "__main__":
    main()
