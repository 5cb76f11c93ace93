"""Our training loop against mlx_lm's, pair by pair, on this machine.

The same LoRA fine-tune of a tiny Llama, the same samples in the same batches. Ours: the worker as the supervisor runs
it, telemetry on and a checkpoint every 5 s. Theirs: mlx_lm.tuner.train with its defaults, which saves no state. Start
and end are left out, checkpoints are not. More than 1 means that ours is faster.
"""

import statistics
from pathlib import Path

import common
import paired


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample, or of the longest")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", choices=["fixed", "varied"], help="one of the two kinds of data")
    options = parser.parse_args()
    results = {}
    for kind in [options.only] if options.only else ["fixed", "varied"]:
        setup = paired.Setup(
            length=options.length, varied=kind == "varied", batch=options.batch, steps=options.steps,
            warm_up=options.steps // 5 // 10 * 10,
        )  # fmt: skip
        results[kind] = measure(kind, setup, options.pairs)
    common.write(options.json, results)


def measure(kind: str, setup: paired.Setup, count: int) -> dict[str, object]:
    """Every pair, printed as it comes, and the median of their ratios."""
    pairs = []
    for number in range(count):
        turns = [paired.ours, paired.mlx_lm]
        found = {turn.__name__: turn(setup) for turn in (turns if number % 2 == 0 else reversed(turns))}
        mine, theirs = found["ours"], found["mlx_lm"]
        last = setup.steps  # their loss is the mean of ten steps: compared, so that both did the same work
        mean = statistics.mean(mine.losses[step] for step in range(last - 9, last + 1))
        if abs(mean - theirs.losses[last]) > 0.01:
            raise RuntimeError(f"not the same training: losses {mean} and {theirs.losses[last]} at step {last}")
        ratio = theirs.step_ms / mine.step_ms
        pairs.append({"ours_ms": mine.step_ms, "mlx_lm_ms": theirs.step_ms, "ratio": ratio})
        print(
            f"{kind} {number + 1}/{count}: ours {mine.step_ms:.3f} ms, mlx_lm {theirs.step_ms:.3f} ms, "
            f"ratio {ratio:.3f}, {mine.checkpoints} checkpoints", flush=True,
        )  # fmt: skip
    median = statistics.median(pair["ratio"] for pair in pairs)
    print(f"{kind}: median ratio {median:.3f} of {count} pairs")
    return {"setup": vars(setup), "pairs": pairs, "median_ratio": median}


if __name__ == "__main__":
    main()
