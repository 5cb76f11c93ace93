"""`mlx-supervisor status`: where runs are, from the journal."""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_supervisor.cli.ctl.status_line import details_of
from mlx_supervisor.cli.offline import places, runs
from mlx_supervisor.cli.offline.runs import KnownRun
from mlx_supervisor.cli.text import clock, iso
from mlx_supervisor.core.events import StepReport
from mlx_supervisor.core.rate import WINDOW_S, Rate
from mlx_supervisor.core.words import counted, duration, figures
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.reader import Record

LIVE = frozenset({"running", "starting"})
STEPS_READ = 2_000
"""Newest reports that are read for the speed: fast updates make many in its window of 30 s."""


LATE_S, LATE_STEPS = 10.0, 10
"""The last update's age is shown from this many seconds on, and this many times the usual step."""
_KEPT = (
    "generation", "target_steps", "loss", "smoothed_loss", "validation_loss", "validation_step",
    "best_validation_loss", "best_validation_step", "metrics", "validation_metrics", "trips",
    "reason", "error", "refused",
)  # fmt: skip


def status(words: Sequence[str], state_dir: Path | None, *, as_json: bool) -> int:
    """A few lines for every run. Returns the exit status: 1 when there is no run."""
    given = places.find(words, state_dir)
    found = runs.chosen(given.places, given.names, whole=True)
    left_out = 0
    if given.everywhere and not (given.names or as_json):
        whole, found = found, [run for run in found if _is_of_interest(run)]
        left_out = len(whole) - len(found)
    reports = [report_of(run) for run in found]
    if as_json:
        print(json.dumps(reports, indent=2))
        return 0 if reports else 1
    if not reports and not left_out:
        print(f"No run yet in {' or '.join(place.shown for place in given.places)}.", file=sys.stderr)
        return 1
    width = max((len(run.name) for run in found), default=0)
    for place in given.places:
        shown = [(run, report) for run, report in zip(found, reports, strict=True) if run.place == place]
        if shown:
            print(f"State folder: {replace(place, settings=place.settings or _settings_of(shown[0][0])).shown}")
        for run, report in shown:
            for line in lines_of(run, report, width):
                print(line)
    if left_out:
        print(f"Left out: {counted(left_out, 'run')} without an update; name one to see it.")
    return 0


def _is_of_interest(run: KnownRun) -> bool:
    """Whether the run made an update, or is running: a mistyped one is neither."""
    if run.worker is not None:
        return True
    step = (run.summary or {}).get("step") if run.history is None else run.history.highest_step
    return bool(step)


def _settings_of(run: KnownRun) -> Path | None:
    """The settings file that started the run; None if it is unknown."""
    file = "" if run.history is None else run.history.settings_file
    return Path(file) if file else None


def report_of(run: KnownRun) -> dict[str, Any]:
    """What `--json` prints for a run. None: not known."""
    past, worker, summary = run.history, run.worker, run.summary or {}
    report: dict[str, Any] = {
        "run": run.name, "state": run.state, "state_dir": str(run.place.path), "supervised": run.supervised,
        "pid": None if worker is None else worker.pid,
        "since": None if worker is None else iso(worker.opened_s),
    }  # fmt: skip
    if past is not None:
        report |= {name: getattr(past, name, None) for name in _KEPT}
        report["restarts"] = past.restarts
        report |= {"step": past.highest_step, "checkpoint_step": past.durable_step, "outcome": past.outcome}
        report |= {"limit_bytes": past.limit_bytes or None, "gradient_checkpointing": past.gradient_checkpointing}
        report["batch_size"] = past.batch_size
    else:
        report |= {name: summary.get(name) for name in ("step", "target_steps", "loss", "trips", "reason", "outcome")}
        report["generation"] = len(summary.get("generations") or []) or None
    return report | _live(run)


def _live(run: KnownRun) -> dict[str, Any]:
    """The figures of the newest reports and samples, and the last notice."""
    if run.journal is None:
        return {}
    try:
        steps, sample = run.journal.last_steps(run.name, STEPS_READ), run.journal.last_sample(run.name)
        notice = run.journal.last_notice(run.name)
    except JournalError as error:
        print(f"{run.name}: {error}", file=sys.stderr)
        return {}
    found: dict[str, Any] = {}
    if steps:
        last = steps[-1]
        found |= {key: last[key] for key in ("step", "loss", "batch_size", "accumulation", "learning_rate")}
        if run.worker is None and run.history is not None and run.history.highest_step > last["step"]:
            del found["step"], found["loss"]  # the last worker trained on after its supervisor's death
        found |= {"step_at": iso(last["wall_s"]), **_speed(run, steps)}
        if run.worker is not None and last["generation"] == run.worker.generation:
            found["usual_step_s"] = usual_step_s(steps)
            if last.get("device_limit_bytes"):
                found["device_used_bytes"] = last["active_bytes"] + last["cache_bytes"]
                found["device_limit_bytes"] = last["device_limit_bytes"]
    if sample is not None and run.worker is not None and sample["generation"] == run.worker.generation:
        found["footprint_bytes"] = sample["footprint_bytes"]
    if notice is not None:
        found |= {"notice": notice["text"], "notice_at": iso(notice["wall_s"])}
    return found


def _speed(run: KnownRun, steps: Sequence[Record]) -> dict[str, Any]:
    """Tokens per second and the time left, as the supervisor computes them; {} without a worker."""
    worker, past = run.worker, run.history
    if worker is None or past is None:
        return {}
    rate = Rate()
    for row in steps:
        if row["generation"] == worker.generation and row["wall_s"] >= steps[-1]["wall_s"] - 2 * WINDOW_S:
            rate.add(_report(row))
    speed = rate.speed(past.target_steps)
    if speed is None:
        return {}
    return {f"{speed.unit}_per_s": round(speed.per_s, 3), "eta_s": speed.left_s}


def usual_step_s(steps: Sequence[Record]) -> float | None:
    """The median time from one report to the next, of the newest generation; None with fewer than two reports."""
    times = [row["wall_s"] for row in steps if row["generation"] == steps[-1]["generation"]]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return round(statistics.median(gaps), 3) if gaps else None


def age_text(age_s: float, usual_s: float | None) -> str:
    """`last update 45 s ago`; "" where that is not unusual."""
    late = usual_s is not None and age_s >= LATE_S and age_s > LATE_STEPS * usual_s
    return f"last update {duration(float(int(age_s)))} ago" if late else ""


def _report(row: Record) -> StepReport:
    names = ("generation", "step", "tokens", "samples", "learning_rate", "seconds", "batch_size", "accumulation")
    values: dict[str, Any] = {name: row[name] or 0 for name in names}
    return StepReport(at_s=row["wall_s"], loss=row["loss"], active_bytes=0, cache_bytes=0, **values)


def lines_of(run: KnownRun, report: dict[str, Any], width: int) -> list[str]:
    """The lines for a person: state and progress, then why or what happened last."""
    live = run.state in LIVE
    extra = report | {"phase": None}
    if not live:
        extra |= {"eta_s": None, "footprint_bytes": None}
    details = [] if run.state == "not started" else details_of(extra) + _metrics(report)
    if live and report.get("usual_step_s") is not None:
        age = age_text(time.time() - _wall_s(report["step_at"]), report["usual_step_s"])
        details += [age] if age else []
    head = [f"{run.name:<{width}}  {run.state:<11}", *([_worker(report)] if live else [])]
    lines = ["  ".join([*head, ", ".join(details)]).rstrip()]
    if run.state == "interrupted":
        lines.append("  its supervisor ended without finishing it; start it again to resume from the last checkpoint")
    failed = run.state not in ("completed", "stopped")  # else the error is that of an earlier generation
    reason = (failed and report.get("error")) or report.get("reason")
    if not live and reason:
        lines.append(f"  {reason}")
    if not live and report.get("refused"):
        lines.append(f"  the last start was refused: {report['refused']}")
    if live and report.get("notice"):
        lines.append(f"  {clock(_wall_s(report['notice_at']))}  {report['notice']:.300}")
    return lines


def _metrics(report: dict[str, Any]) -> list[str]:
    """The task's own figures of the last validation: `validation accuracy=0.912`."""
    return [f"validation {figure}" for figure in figures(report.get("validation_metrics") or {})]


def _worker(report: dict[str, Any]) -> str:
    up_s = max(time.time() - _wall_s(report["since"]), 0.0)
    return f"generation {report.get('generation')}, pid {report['pid']}, up {duration(up_s)}"


def _wall_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
