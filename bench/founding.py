"""The failure that this project was founded on: a trainer that leaks 48 to 95 MiB/step and dies after 30 to 50 steps.

Runs the first run's task with that leak as a drill: first unsupervised under the same limit, until it dies, then
supervised for 1,000 steps. Required: all steps are done, and none is replayed. Also prints the goodput: the share of
the time spent on steps that count.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from support import common


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--leaks-mib", default="48,95", help="leaks in MiB/step; one run each")
    options = parser.parse_args()
    results = [condition(float(leak_mib), options.steps) for leak_mib in options.leaks_mib.split(",")]
    columns = ("leak_mib_per_step", "bare_died_after", "steps", "generations", "trips", "replayed_steps", "goodput")
    common.table(columns, [[result[column] for column in columns] for result in results])
    good = all(result["steps"] == options.steps and result["replayed_steps"] == 0 for result in results)
    print(f"required: {options.steps} steps, none replayed: {'met' if good else 'MISSED'}")
    common.write(options.json, {"results": results})
    raise SystemExit(0 if good else 1)


def condition(leak_mib: float, steps: int) -> dict[str, Any]:
    """One leak, unsupervised and supervised. The limit leaves room for about 40 steps."""
    limit_mib = round(400 + 40 * leak_mib)
    tables = (
        f'[runs.bench.memory]\nlimit = "{limit_mib} MiB"\n[runs.bench.checkpoint]\nevery_steps = 10\n'
        f"[runs.bench.drill]\nleak_mib_per_step = {leak_mib}\n"
    )
    text = common.llama(steps, 4, 32, tables)
    with common.workplace(text) as folder:
        common.with_examples(folder)
        died_after = bare(folder)
        summary = common.run(folder)
    generations = summary["generations"]
    return {
        "leak_mib_per_step": leak_mib, "limit_mib": limit_mib, "bare_died_after": died_after,
        "outcome": summary["outcome"], "steps": summary["step"], "generations": len(generations),
        "trips": summary["trips"], "replayed_steps": summary["replayed_steps"], "goodput": summary["goodput"],
        "checkpoint_stall_fraction": summary["checkpoint_stall_fraction"],
        "causes": [one["cause"] for one in generations], "batches": [one["batch_size"] for one in generations],
        "peaks_mib": [one["peak_footprint_mib"] for one in generations],
    }  # fmt: skip


def bare(folder: Path) -> int:
    """The last step that the unsupervised run printed before it died. Raises RuntimeError if it survives."""
    command = [*common.SUPERVISOR, "run", str(folder / "settings.toml"), "--bare", "--state-dir", str(folder / "bare")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode == 0:
        raise RuntimeError(f"the unsupervised run survived: {output[-2000:]}")
    return max((int(step) for step in re.findall(r"^step (\d+)", output, re.MULTILINE)), default=0)


if __name__ == "__main__":
    main()
