"""How far a run exceeds its limit before it is dead, when memory grows and the worker sends no telemetry.

The overshoot is the memory of the ramp (bench/support/ramp.py) at its death minus the limit: its charged bytes at the
start plus all bytes touched since, as the ramp records them in a mapped file. The resolution is one chunk of 256 KiB
(from 1 GiB/s on: 2 MiB), which counts from its beginning. About 100 KiB that Python allocates meanwhile do not count,
so a kill exactly at the limit can read as slightly below 0. The time runs from the chunk that reached the limit to the
last one. The rate is the average of the whole ramp, which catches up after delays and so may be faster at the limit.

Uses the real sampler, state machine and kill path of `mlx-supervisor run`. Also shows the supervisor's last sample, and
the time from the start, and from the end, of the deciding sample to the return of the kill call
(bench/support/timed.py). There are two tables: with the machine as it is, and with every core busy.
"""

import contextlib
import json
import mmap
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import common, timed
from support.ramp import RECORD

RAMPS = ((128, 512), (1024, 2048), (4096, 6144))
"""Rates in MiB/s and limits in MiB: ramps of about 4 s, 2 s and 1.5 s."""


def settings(limit_mib: int) -> str:
    return (
        '[runs.ramp]\nsteps = 1\ntask = { kind = "python", entry = "ramp:main" }\n'
        f'[runs.ramp.memory]\nlimit = "{limit_mib} MiB"\n'
        "[runs.ramp.restart]\nmax_without_progress = 1\n"
    )


def warm(size_mib: int) -> None:
    """Touch and free memory, so that a virtual machine's host provides it: a first touch may be too slow."""
    with mmap.mmap(-1, size_mib * common.MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) as room:
        room.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(room), mmap.PAGESIZE):
            room[offset] = 1


def ramp(rate_mib_per_s: int, limit_mib: int) -> dict[str, Any]:
    """Run one ramp until it is killed. Raises RuntimeError if it ended otherwise."""
    worker = shlex.join([sys.executable, str(common.SUPPORT / "ramp.py"), str(rate_mib_per_s), str(limit_mib)])
    warm(limit_mib * 5 // 4)
    with common.workplace(settings(limit_mib)) as folder:
        kill = folder / "kill.json"
        summary = common.run(folder, {"MLX_SUPERVISOR_WORKER": worker, timed.RECORD: str(kill)})
        killed = json.loads(kill.read_bytes())
        numbers = RECORD.unpack((folder / "state" / "runs" / "ramp" / "ramp.bin").read_bytes())
    base, requested, touched, start_ns, crossed_ns, last_ns = numbers
    generation = summary["generations"][-1]
    if "signal 9" not in generation["ended"].lower() and "sigkill" not in generation["ended"].lower():
        raise RuntimeError(f"not killed: {summary}")
    return {
        "overshoot_mib": (base + requested) / common.MIB - limit_mib,
        "last_sample_over_limit_mib": generation["peak_footprint_mib"] - limit_mib,
        "limit_to_last_chunk_ms": (last_ns - crossed_ns) / 1e6 if crossed_ns else 0.0,
        "achieved_mib_per_s": touched / common.MIB / ((last_ns - start_ns) / 1e9),
        "decision_to_signal_ms": 1e3 * (killed["killed_s"] - killed["sampled_s"]),
        "measured_to_signal_ms": 1e3 * (killed["killed_s"] - killed["measured_s"]),
        "cause": generation["cause"],
    }


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Keep so many processes busy."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in spinners:
            each.kill()
            each.wait()


def measure(ramps: int, busy: int, only: list[int]) -> list[dict[str, Any]]:
    """All ramps beside so many busy processes; prints a table."""
    rows, rates = [], []
    for rate, limit in RAMPS:
        if only and rate not in only:
            continue
        seen = []
        for number in range(ramps):
            seen.append(ramp(rate, limit))
            print(f"{rate} MiB/s, {number + 1}/{ramps}: {seen[-1]}", file=sys.stderr)
        names = [name for name in seen[0] if name != "cause"]
        spreads = {name: common.spread([each[name] for each in seen]) for name in names}
        rows += [[f"{rate} MiB/s: {name}", *spread.values()] for name, spread in spreads.items()]
        rates.append({"rate_mib_per_s": rate, "limit_mib": limit, "busy": busy, "spread": spreads, "ramps": seen})
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"\nPast the limit, beside {busy} busy processes (load of the machine at the end: {load})")
    common.table(["", *common.SPREAD], rows)
    return rates


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--ramps", type=int, default=20, help="ramps at each rate")
    parser.add_argument("--busy", type=int, default=8, help="processes that compute meanwhile, for the second table")
    parser.add_argument("--only", choices=["idle", "busy"], help="one of the tables")
    parser.add_argument("--rate", type=int, action="append", default=[], help="this rate only, in MiB/s")
    options = parser.parse_args()
    common.SUPERVISOR[1:] = [timed.__file__]
    result = {}
    if options.only != "busy":
        result["idle"] = measure(options.ramps, 0, options.rate)
    if options.only != "idle":
        with spinning(options.busy):
            result["busy"] = measure(options.ramps, options.busy, options.rate)
    common.write(options.json, result)


if __name__ == "__main__":
    main()
