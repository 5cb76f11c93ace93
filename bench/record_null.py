"""Records healthy runs under the real supervisor, as fixtures of the tests.

For each task of `support/null_tasks.py`: a short run finds the highest footprint; then 5,000 updates of varied lengths,
with evaluations and checkpoints, run under a limit of 1.5 times that. A trip or a leak verdict fails the recording. The
trace has one row per step: footprint at its end (null without a sample), highest sample since the previous step, MLX's
active memory and cache (all in KiB), tokens, milliseconds; and the phases, each with the number of steps before it and
its highest sample.
"""

import asyncio
import gzip
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import common

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.logs import daemon_log
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import StateDir

FIXTURES = common.BENCH.parent / "tests" / "core" / "memory" / "fixtures"
LIMIT_BYTES = 200 * 1024
TASKS = {"lora": 2, "full": 4}
"""Micro-batches."""
HEADROOM = 1.5
SCOUT_STEPS = 400
COLUMNS = ("footprint_kib", "peak_kib", "active_kib", "cache_kib", "tokens", "milliseconds")


class Recorder(Observer):
    """Records the breaker's input and its verdicts."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, ...]] = []
        self.phases: list[list[Any]] = []
        self.verdicts: list[int] = []
        self.peak_bytes = 0
        self._last: int | None = None
        self._highest = 0

    def on_event(self, run: Run, event: ev.Event) -> None:
        """Called after the machine has handled the event."""
        match event:
            case ev.Sample():
                self.peak_bytes = max(self.peak_bytes, event.footprint_bytes)
                self._last, self._highest = event.footprint_bytes, max(self._highest, event.footprint_bytes)
                if self.phases and self.phases[-1][1] != "train":
                    self.phases[-1][2] = max(self.phases[-1][2], event.footprint_bytes // 1024)
            case ev.PhaseChange() if not self.phases or self.phases[-1][1] != event.phase.value:
                self.phases.append([len(self.rows), event.phase.value, 0])
                self._last, self._highest = None, 0
            case ev.StepReport():
                self._add(event)
                if run.breaker.leaking:
                    self.verdicts.append(event.step)

    def _add(self, report: ev.StepReport) -> None:
        last = None if self._last is None else self._last // 1024
        memory = (last, self._highest // 1024, report.active_bytes // 1024, report.cache_bytes // 1024)
        self.rows.append((*memory, report.tokens, round(1000 * report.seconds)))
        self._last, self._highest = None, 0


def settings(task: str, steps: int, limit_mib: float) -> str:
    return (
        f'[runs.null]\nsteps = {steps}\nseed = 7\ntask = {{ kind = "python", entry = "null_tasks:{task}" }}\n'
        f"[runs.null.batch]\nsize = {TASKS[task]}\n"
        f'[runs.null.memory]\nlimit = "{limit_mib:.0f} MiB"\n'
        "[runs.null.checkpoint]\nevery_steps = 100\nkeep = 2\n"
    )


def record(task: str, steps: int, limit_mib: float) -> tuple[Recorder, dict[str, Any]]:
    """One complete run: its recording and its summary."""
    with common.workplace(settings(task, steps, limit_mib)) as folder:
        for name in ("null_tasks.py", "lora_task.py", "slices.py"):
            (folder / name).symlink_to(common.SUPPORT / name)
        chosen = read_settings(folder / "settings.toml", folder / "state")
        state = StateDir(chosen.state_dir)
        try:
            daemon_log.configure(state.log, console=False)
            recorder = Recorder()
            return recorder, asyncio.run(_run(Daemon(chosen, state, [recorder])))
        finally:
            state.close()


async def _run(daemon: Daemon) -> dict[str, Any]:
    await daemon.open()
    run = daemon.runs["null"]
    try:
        await daemon.recovered()
        run.command(CommandKind.START, "bench")
        await run.until(lambda: run.at_rest)
        return run.summary()
    finally:
        await daemon.close()


def write(path: Path, task: str, limit_bytes: int, recorder: Recorder, summary: Mapping[str, Any]) -> None:
    """Write the trace as a fixture. Raises RuntimeError if it is too large."""
    columns = dict(zip(COLUMNS, map(list, zip(*recorder.rows, strict=True)), strict=True))
    trace = {
        "task": task, "system": platform.system(), "limit_bytes": limit_bytes, "peak_bytes": recorder.peak_bytes,
        "trips": summary["trips"], "phases": recorder.phases, "columns": columns,
    }  # fmt: skip
    data = gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), 9, mtime=0)
    if len(data) > LIMIT_BYTES:
        raise RuntimeError(f"{path}: found {len(data):,} bytes; allowed: at most {LIMIT_BYTES:,}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--fixtures", type=Path, default=FIXTURES)
    options = parser.parse_args()
    results = {}
    for task in options.tasks:
        scout, _ = record(task, SCOUT_STEPS, 8192)
        limit_mib = HEADROOM * scout.peak_bytes / common.MIB
        recorder, summary = record(task, options.steps, limit_mib)
        write(options.fixtures / f"null-{task}.json.gz", task, int(limit_mib * common.MIB), recorder, summary)
        results[task] = {
            "outcome": summary["outcome"], "steps": len(recorder.rows), "trips": summary["trips"],
            "generations": len(summary["generations"]), "verdicts_at": recorder.verdicts[:50],
            "scout_peak_mib": scout.peak_bytes / common.MIB, "peak_mib": recorder.peak_bytes / common.MIB,
            "sampled_steps": sum(row[0] is not None for row in recorder.rows),
            "phases": len(recorder.phases),
        }  # fmt: skip
        print(task, json.dumps(results[task]))
    common.write(options.json, {"tasks": results})
    bad = [
        name for name, one in results.items()
        if one["trips"] or one["verdicts_at"] or one["outcome"] != "completed" or one["generations"] != 1
    ]  # fmt: skip
    if bad:
        sys.exit(f"a healthy run had a trip, a leak verdict or a restart: {', '.join(bad)}")


if __name__ == "__main__":
    main()
