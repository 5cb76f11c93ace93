"""What supervision costs: steps per second of a supervised run divided by those of a bare one, in pairs.

Runs the same job with `mlx-supervisor run` and then with `python -m mlx_worker JOB --bare`, alternately, so that both
see the same machine load. Both rates are the training loop's own, from the worker's last line: start and end do not
count.
"""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from support import common

RATE = re.compile(r"^completed: .*steps_per_second=([0-9.]+)", re.MULTILINE)


def supervised(folder: Path) -> float:
    """Steps per second under the supervisor."""
    summary = common.run(folder)
    if summary["outcome"] != "completed" or len(summary["generations"]) != 1:
        raise RuntimeError(f"expected one completed generation: {summary}")
    return rate_of((folder / "state" / "runs" / "bench" / "logs" / "stdout.log").read_text())


def bare(folder: Path) -> float:
    """Steps per second of the job that the supervisor wrote, unsupervised and in a separate folder."""
    job = json.loads((folder / "state" / "runs" / "bench" / "job.json").read_bytes())
    alone = folder / "bare"
    alone.mkdir()
    (alone / "job.json").write_text(json.dumps({**job, "run_dir": str(alone), "telemetry": None}))
    command = [sys.executable, "-m", "mlx_worker", str(alone / "job.json"), "--bare"]
    return rate_of(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rate_of(output: str) -> float:
    """Steps per second from the worker's last line. Raises RuntimeError without that line."""
    match = RATE.search(output)
    if match is None:
        raise RuntimeError(f"the worker printed no rate: {output[-500:]}")
    return float(match[1])


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    options = parser.parse_args()
    pairs = []
    for number in range(options.pairs):
        with common.workplace(common.llama(options.steps, batch=8, length=64)) as folder:
            common.with_examples(folder)
            pair = {"supervised": supervised(folder), "bare": bare(folder)}
        pairs.append({**pair, "ratio": pair["supervised"] / pair["bare"]})
        print(f"{number + 1}/{options.pairs}: {pairs[-1]}", file=sys.stderr)
    median = statistics.median(pair["ratio"] for pair in pairs)
    common.table(
        ["pair", "supervised steps/s", "bare steps/s", "ratio"],
        [[number + 1, *(f"{value:.3f}" for value in pair.values())] for number, pair in enumerate(pairs)],
    )
    print(f"median ratio {median:.4f}: supervision costs {100 * (1 - median):.2f} % (below 0: noise)")
    common.write(options.json, {"steps": options.steps, "pairs": pairs, "median_ratio": median})


if __name__ == "__main__":
    main()
