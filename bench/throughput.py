"""Our training loop against mlx_lm's on this machine, in slices of a second, turn by turn.

The same LoRA fine-tune of a tiny Llama, the same samples in the same batches. Ours: the worker as the supervisor runs
it, telemetry on and a checkpoint every 5 s of the clock, also of the clock of the other's turns. Theirs:
mlx_lm.tuner.train with its defaults, which saves no state. First a number of updates that are not timed. More than 1
means that ours is faster.
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
    parser.add_argument("--pairs", type=int, default=60, help="pairs of slices, of each kind of data")
    parser.add_argument("--slice-s", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample, or of the longest")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", choices=["fixed", "varied"], help="one of the two kinds of data")
    options = parser.parse_args()
    results = {}
    for kind in [options.only] if options.only else ["fixed", "varied"]:
        setup = paired.Setup(
            length=options.length, varied=kind == "varied", batch=options.batch, steps=ENDLESS_STEPS, warm_up=0
        )
        results[kind] = measure(kind, setup, options.pairs, options.slice_s)
    common.table(
        ["data", "pairs", "ours steps/s", "mlx_lm steps/s", "median ratio", "95 % of the median", "ours CPU ms/step",
         "mlx_lm CPU ms/step"],
        [
            [kind, len(found["pairs"]), f"{found['ours_per_s']:.2f}", f"{found['mlx_lm_per_s']:.2f}",
             f"{found['median_ratio']:.3f}", "{:.3f} to {:.3f}".format(*found["interval"]),
             found["ours_cpu_ms"], found["mlx_lm_cpu_ms"]]
            for kind, found in results.items()
        ],
    )  # fmt: skip
    common.write(options.json, {"slice_s": options.slice_s, **results})


def measure(kind: str, setup: paired.Setup, count: int, slice_s: float) -> dict[str, Any]:
    """Every pair of slices, and the median of their ratios. Who begins changes from pair to pair."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, paired.listening(Path(name)) as listener:
        folder = Path(name)
        command = paired.worker_command(folder, setup, listener.endpoint, None, {"every_seconds": 5.0})
        result = {"BENCH_RESULT": os.devnull}
        ours = slices.Contestant("ours", command, folder, {})
        theirs = slices.Contestant("mlx_lm", paired.mlx_lm_command(setup), folder, result)
        with slices.taking_turns(ours, theirs):
            ours.go_to(WARM_UP_STEPS, paired.TIMEOUT_S)
            theirs.go_to(WARM_UP_STEPS, paired.TIMEOUT_S)
            pairs = []
            for number in range(count):
                turns = [ours, theirs] if number % 2 == 0 else [theirs, ours]
                found = {one.name: one.work(slice_s) for one in turns}
                pairs.append({**found, "ratio": found["ours"] / found["mlx_lm"]})
                print(
                    f"{kind} {number + 1}/{count}: ours {found['ours']:.2f} steps/s, mlx_lm {found['mlx_lm']:.2f}, "
                    f"ratio {pairs[-1]['ratio']:.3f}", flush=True,
                )  # fmt: skip
    print(f"{kind}: {listener.checkpoints} checkpoints, {len(listener.steps)} updates told of", flush=True)
    ratios = [pair["ratio"] for pair in pairs]
    return {
        "setup": vars(setup), "pairs": pairs, "checkpoints": listener.checkpoints,
        "ours_per_s": statistics.median(pair["ours"] for pair in pairs),
        "mlx_lm_per_s": statistics.median(pair["mlx_lm"] for pair in pairs),
        "median_ratio": statistics.median(ratios), "interval": interval(ratios),
        "ours_cpu_ms": 1000 * ours.cpu_s / ours.batches, "mlx_lm_cpu_ms": 1000 * theirs.cpu_s / theirs.batches,
    }  # fmt: skip


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Where the median lies in 95 of 100 draws with replacement (bootstrap)."""
    generator = random.Random(1)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


if __name__ == "__main__":
    main()
