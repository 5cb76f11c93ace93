"""The condition that this project was founded on: a trainer that leaks 50 to 100 MB a step and dies after 30 to 50.

The first run's task with that leak as a drill, first unguarded under the same limit, to see it die, then supervised for
1,000 steps. Wanted: all of them, none done twice, and the share of the time that went into steps that counted.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from support import common

MB = 1e6


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--leaks-mb", default="50,100", help="MB a step, one run each")
    options = parser.parse_args()
    results = [condition(float(leak_mb), options.steps) for leak_mb in options.leaks_mb.split(",")]
    columns = ("leak_mb_per_step", "unguarded_died_after", "steps", "lives", "trips", "replayed_steps", "goodput")
    common.table(columns, [[result[column] for column in columns] for result in results])
    good = all(result["steps"] == options.steps and result["replayed_steps"] == 0 for result in results)
    print(f"wanted: {options.steps} steps, none done twice: {'kept' if good else 'MISSED'}")
    common.write(options.json, {"results": results})
    raise SystemExit(0 if good else 1)


def condition(leak_mb: float, steps: int) -> dict[str, Any]:
    """One leak, unguarded and supervised. The limit leaves room for some 40 steps of it."""
    leak_mib = leak_mb * MB / common.MIB
    limit_mib = round(400 + 40 * leak_mib)
    tables = (
        f'[runs.bench.memory]\nlimit = "{limit_mib} MiB"\n[runs.bench.checkpoint]\nevery_steps = 10\n'
        f"[runs.bench.drill]\nleak_mib_per_step = {leak_mib}\n"
    )
    text = common.llama(steps, 4, 32, tables)
    with common.workplace(text) as folder:
        common.with_examples(folder)
        died_after = unguarded(folder)
        summary = common.run(folder)
    lives = summary["generations"]
    return {
        "leak_mb_per_step": leak_mb, "limit_mib": limit_mib, "unguarded_died_after": died_after,
        "outcome": summary["outcome"], "steps": summary["step"], "lives": len(lives), "trips": summary["trips"],
        "replayed_steps": summary["replayed_steps"], "goodput": summary["goodput"],
        "checkpoint_stall_fraction": summary["checkpoint_stall_fraction"],
        "causes": [life["cause"] for life in lives], "batches": [life["batch_size"] for life in lives],
        "peaks_mib": [life["peak_footprint_mib"] for life in lives],
    }  # fmt: skip


def unguarded(folder: Path) -> int:
    """The last step that it told of before it died. Raises RuntimeError when it did not die."""
    command = [*common.SUPERVISOR, "run", str(folder / "settings.toml"), "--bare", "--state-dir", str(folder / "bare")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        raise RuntimeError(f"it did not die: {said[-2000:]}")
    return max((int(step) for step in re.findall(r"^step (\d+)", said, re.MULTILINE)), default=0)


if __name__ == "__main__":
    main()
