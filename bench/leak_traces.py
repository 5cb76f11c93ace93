"""How well the breaker distinguishes leaks from other growth: required and measured, on simulated traces.

By default with the traces of tests/core/memory/traces.py, from other seeds than the tests. `--traces FOLDER` takes the
traces of another generator: files .npz or .json, each a group of runs, with `footprint`, `cache`, `active` (runs x
steps, MB, at the ends of steps), `peak` (MB, each run's assumed healthy peak), `onset` (each run's first leaking step),
`leak` (MB per step, 0 for healthy runs), and `harsh` (with a bounded ramp that is no leak). MB is 10^6 bytes here; the
printed table has MiB/step.
"""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import common

sys.path.insert(0, str(common.BENCH.parent))

from tests.core.memory.traces import Trace, replay, training

LEAKS_MB = {0.5: 450, 1.0: 280, 5.0: 60, 50.0: 30, 100.0: 30}
"""MB per step of a leak: the median number of steps in which it must be detected."""
SLOPE_ERROR = 0.3
LEAD_STEPS, LEAD_SHARE = 3, 0.96
TRIPS_PER_10K = {1.5: 0.0, 1.25: 0.2, 1.1: None}
"""Allowed false trips, by the limit relative to the healthy peak. None: reported only."""
WARM_UP_STEPS = 100
EPISODE_STEPS = 100
"""Verdicts closer together than this count as one."""
NO_LIMIT_MB = 1e7


@dataclass
class Group:
    """Runs of one kind."""

    name: str
    leak_mb: float
    harsh: bool
    traces: list[Trace] = field(default_factory=list)

    @property
    def late(self) -> bool:
        """Whether the leak begins after the warm-up."""
        return all(trace.onset >= WARM_UP_STEPS for trace in self.traces)


def simulated(null: int, leaking: int, first_seed: int) -> Iterator[Group]:
    """Groups from the generator of the tests."""
    yield Group("healthy", 0.0, False, [training(first_seed + i, steps=2400) for i in range(null)])
    for kind in ("late", "first"):
        for number, leak in enumerate(LEAKS_MB):
            seeds = [first_seed + 100_000 * (number + 1) + i for i in range(leaking)]
            onsets = [400 + seed * 7 % 200 if kind == "late" else 0 for seed in seeds]
            traces = [training(seed, leak, onset, 2400) for seed, onset in zip(seeds, onsets, strict=True)]
            yield Group(f"{_mib_per_step(leak)} {kind}", leak, False, traces)
    for leak in (1.0, 5.0, 50.0):
        traces = [training(first_seed + 900_000 + i, leak, 400 + i, 2400, native=True) for i in range(leaking)]
        yield Group(f"{_mib_per_step(leak)} native", leak, False, traces)


def _mib_per_step(leak_mb: float) -> str:
    return f"{leak_mb * 1e6 / common.MIB:.2g} MiB/step"


def read(folder: Path) -> Iterator[Group]:
    """Groups from the files of another generator. Raises ValueError for a file with a missing field."""
    files = sorted([*folder.glob("*.npz"), *folder.glob("*.json")])
    if not files:
        raise ValueError(f"{folder}: found no .npz or .json file")
    for file in files:
        yield _group(file)


def _group(file: Path) -> Group:
    data: dict[str, Any]
    if file.suffix == ".npz":
        import numpy as np

        with np.load(file) as arrays:
            data = {name: arrays[name].tolist() for name in arrays.files}
    else:
        data = json.loads(file.read_text())
    missing = {"footprint", "cache", "active", "peak", "onset", "leak", "harsh"} - data.keys()
    if missing:
        raise ValueError(f"{file}: missing fields: {', '.join(sorted(missing))}")
    group = Group(file.stem, float(data["leak"]), bool(data["harsh"]))
    rows = zip(data["footprint"], data["cache"], data["active"], data["onset"], data["peak"], strict=True)
    for footprint, cache, active, onset, peak in rows:
        group.traces.append(Trace(footprint, cache, active, {}, int(onset), group.leak_mb, peak))
    return group


def verdicts(trace: Trace) -> tuple[list[int], float | None]:
    """Steps with a verdict, and the slope at the first one after the onset, without a limit."""
    end = trace.onset + 700 if trace.leak_mb else len(trace.footprint)
    short = Trace(trace.footprint[:end], trace.cache[:end], trace.active[:end], trace.excursions, trace.onset)
    seen = replay(short, NO_LIMIT_MB, to_the_trip=False)
    return seen.verdicts, seen.slope_mb


def tripped(arguments: tuple[Trace, float]) -> tuple[int | None, int | None]:
    """The step of the first soft trip, and the step at which the limit is crossed; None without."""
    trace, headroom = arguments
    limit_mb = headroom * trace.peak_mb
    return replay(trace, limit_mb).soft_step, trace.crossing(limit_mb)


def episodes(steps: Sequence[int], first: int) -> int:
    """The number of episodes of verdicts from the step `first` on."""
    counted = [step for step in steps if step >= first]
    return sum(i == 0 or step - counted[i - 1] > EPISODE_STEPS for i, step in enumerate(counted))


@dataclass
class Report:
    """Rows of the table, and the requirements that were missed."""

    rows: list[list[str]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, what: str, bound: float | None, measured: float, note: str = "", *, at_least: bool = False) -> None:
        good = bound is None or (measured >= bound if at_least else measured <= bound)
        required = "" if bound is None else f"{'>=' if at_least else '<='} {bound:g}"
        self.rows.append([what, required, f"{measured:.3g}", "" if good else "MISSED", note])
        if not good:
            self.missed.append(what)


def judge_healthy(pool: Any, group: Group, report: Report) -> None:
    """Rates of false verdicts and false trips of healthy runs."""
    steps = sum(len(trace.footprint) for trace in group.traces)
    found = [seen for seen, _ in pool.map(verdicts, group.traces, 2)]
    for first in (WARM_UP_STEPS, 400):
        count = sum(episodes(seen, first) for seen in found)
        rate = 1e4 * count / (steps - first * len(found))
        report.add(
            f"{group.name}: verdicts per 10,000 steps after step {first}", None, rate, f"{count} of {steps} steps"
        )
    for headroom, required in TRIPS_PER_10K.items():
        seen = pool.map(tripped, [(trace, headroom) for trace in group.traces], 2)
        counted = [trip for trip, crossing in seen if crossing is None]
        trips = sum(trip is not None for trip in counted)
        steps_seen = sum(len(group.traces[0].footprint) if trip is None else trip for trip in counted)
        note = f"{trips} in {steps_seen} steps"
        rate = 1e4 * trips / max(steps_seen, 1)
        report.add(f"{group.name}: trips per 10,000 steps at {headroom}", None if group.harsh else required, rate, note)


def judge_leak(pool: Any, group: Group, report: Report, leads: dict[float, list[int]]) -> None:
    """Delay of the verdict, error of the slope, and steps between the trip and the crossing."""
    seen = pool.map(verdicts, group.traces, 2)
    delays, errors = [], []
    for trace, (steps, slope_mb) in zip(group.traces, seen, strict=True):
        after = [step for step in steps if step >= trace.onset]
        delays.append(after[0] - trace.onset + 1 if after else 10**6)
        if after and slope_mb is not None:
            errors.append(abs(slope_mb - group.leak_mb) / group.leak_mb)
    judged = group.late and "native" not in group.name
    required = LEAKS_MB.get(group.leak_mb) if judged else None
    spread, missing = common.spread(delays), sum(delay == 10**6 for delay in delays)
    note = f"{len(delays)} runs, p95 {min(spread['p95'], 999):.0f}, {missing} not within 700 steps"
    report.add(f"{group.name}: steps to the verdict, median", required, spread["median"], note)
    if errors:
        p90 = sorted(errors)[min(len(errors) - 1, int(0.9 * len(errors)))]
        bound = SLOPE_ERROR if judged else None
        report.add(f"{group.name}: slope error, median", bound, statistics.median(errors), f"p90 {p90:.2f}")
    for headroom in (1.5, 1.25):
        pairs = pool.map(tripped, [(trace, headroom) for trace in group.traces], 2)
        lead = [crossing - (crossing if trip is None else trip) for trip, crossing in pairs if crossing is not None]
        leads.setdefault(headroom, []).extend(lead)
        if lead:
            share = sum(one >= LEAD_STEPS for one in lead) / len(lead)
            note = f"{len(lead)} crossings, lead min {min(lead)}, median {statistics.median(lead):.0f}"
            report.add(f"{group.name}: share of trips in time at {headroom}", None, share, note)


def cost_us() -> float:
    """Microseconds that the breaker takes for one sample and one step report."""
    trace = training(1, steps=5000)
    started_s = time.perf_counter()
    replay(trace, NO_LIMIT_MB, to_the_trip=False)
    return 1e6 * (time.perf_counter() - started_s) / len(trace.footprint)


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--traces", type=Path, help="a folder with the traces of another generator")
    parser.add_argument("--null", type=int, default=130, help="number of healthy runs, of 2,400 steps each")
    parser.add_argument("--leaking", type=int, default=40, help="number of runs for each leak")
    parser.add_argument("--first-seed", type=int, default=5_000_000)
    options = parser.parse_args()
    report, leads = Report(), {}
    groups = read(options.traces) if options.traces else simulated(options.null, options.leaking, options.first_seed)
    with multiprocessing.Pool() as pool:
        for group in groups:
            print(f"{group.name}: {len(group.traces)} runs", file=sys.stderr)
            if group.leak_mb:
                judge_leak(pool, group, report, leads)
            else:
                judge_healthy(pool, group, report)
    for headroom, lead in leads.items():
        share = sum(one >= LEAD_STEPS for one in lead) / max(len(lead), 1)
        what = f"all leaks: share of trips at least {LEAD_STEPS} steps ahead at {headroom}"
        report.add(what, LEAD_SHARE, share, f"{len(lead)} crossings", at_least=True)
    report.add("microseconds per step", None, cost_us())
    common.table(["", "required", "measured", "", "note"], report.rows)
    common.write(options.json, {"traces": "other" if options.traces else "simulated", "rows": report.rows})
    if report.missed:
        sys.exit(f"missed: {'; '.join(report.missed)}")


if __name__ == "__main__":
    main()
