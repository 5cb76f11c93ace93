"""`mlx-supervisor history`: every run and its generations, also those of a run that was started over."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_supervisor.cli.offline import places, runs
from mlx_supervisor.cli.offline.runs import KnownRun
from mlx_supervisor.cli.text import batch, iso, loss, moment, steps, table
from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, refused_at_start
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import counted, duration, loss_text, validation_text
from mlx_supervisor.journal.database import JournalError

COLUMNS = (
    "run", "state_dir", "generation", "started", "ended", "seconds", "first_step", "last_step", "batch_size",
    "accumulation", "trips", "peak_footprint_mib", "loss", "cause", "exit", "error",
    "peak_device_mib",
)  # fmt: skip


def history(words: Sequence[str], state_dir: Path | None, *, as_csv: bool, as_json: bool) -> int:
    """A table of generations for each run, or one row per generation with `as_csv`. Returns the exit status."""
    given = places.find(words, state_dir)
    found = runs.chosen(given.places, given.names) + ([] if given.names else _started_over(given.places))
    histories = [history_of(run) for run in found]
    if as_json:
        print(json.dumps(histories, indent=2))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for each in histories:
            writer.writerows({**each, **row} for row in each["generations"])
    elif found:
        print("\n\n".join("\n".join(lines_of(each)) for each in histories))
    if not found:
        print(f"No run yet in {' or '.join(place.shown for place in given.places)}.", file=sys.stderr)
    return 0 if found else 1


def _started_over(found: Sequence[places.Place]) -> list[KnownRun]:
    return [run for place in found for run in runs.all_of(place) if runs.PREVIOUS.search(run.name) and run.summary]


def history_of(run: KnownRun) -> dict[str, Any]:
    """The run's figures, and a record for each generation, in the summary's keys and some of the journal's."""
    past, summary = run.history, run.summary or {}
    figures = dict(summary)
    if past is not None:
        figures |= {"step": past.highest_step, "reason": past.reason} | {key: getattr(past, key, None) for key in _KEPT}
    generations = _generations(run) or [_summarized(record) for record in summary.get("generations") or []]
    if run.worker is not None:  # the journal's history is older than its steps
        figures["step"] = max(figures.get("step") or 0, generations[-1].get("last_step") or 0)
        figures["loss"] = generations[-1].get("loss") or figures.get("loss")
    return {
        "run": run.name, "state_dir": str(run.place.path), "state": run.state, "reason": figures.get("reason"),
        "refused": "" if past is None else past.refused,
        "step": figures.get("step"), **{name: figures.get(name) for name in _KEPT}, "generations": generations,
    }  # fmt: skip


_KEPT = (
    "target_steps", "loss", "validation_loss", "validation_step", "best_validation_loss", "best_validation_step",
    "trips", "replayed_steps", "goodput",
)  # fmt: skip


def _generations(run: KnownRun) -> list[dict[str, Any]]:
    if run.journal is None:
        return []
    try:
        totals, trips = run.journal.step_totals(run.name), run.journal.tripped(run.name)
        peaks = run.journal.peaks(run.name)
    except JournalError as error:
        print(f"{run.name}: {error}", file=sys.stderr)
        totals, trips, peaks = {}, set(), {}
    live = run.worker
    records = []
    for each in run.generations:
        total, ended = totals.get(each.generation, {}), each.record
        record: dict[str, Any] = {"generation": each.generation, **_so_far(total), **(ended or {})}
        record |= {"started": iso(each.opened_s), "loss": total.get("loss")}
        record["trips"] = int(each.generation in trips or record.get("cause") in MEMORY_CAUSES)
        record["exit"] = record.pop("ended", None)  # "ended" is a time here
        record["ended"] = iso(each.opened_s + record["seconds"]) if ended else None
        if ended is None:
            record["peak_footprint_mib"] = round(peaks.get(each.generation, 0) / MIB, 1) or None
            record["cause"] = "running" if each is live else "not recorded (its supervisor ended)"
        records.append(record)
    return records


def _summarized(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of summary.json: when the generation began and ended is not in it."""
    return {**record, "exit": record.get("ended"), "ended": None, "trips": None}


def _so_far(total: Mapping[str, Any]) -> dict[str, Any]:
    """What the steps say of a generation without a recorded end."""
    if not total:
        return {"seconds": 0.0}
    names = ("batch_size", "accumulation", "first_step")
    seconds = round(total["last_wall_s"] - total["first_wall_s"], 3)
    return {name: total[name] for name in names} | {"last_step": total["step"], "seconds": seconds}


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """One run for a person."""
    parts = [f"step {found['step']} of {found['target_steps']}"] if found["step"] else []
    if found["loss"] is not None:
        parts.append(f"loss {loss_text(found['loss'])}")
    if found["validation_loss"] is not None:
        best = found["best_validation_loss"], found["best_validation_step"]
        parts.append(f"validation loss {validation_text(found['validation_loss'], found['validation_step'], *best)}")
    parts.append(counted(found["trips"] or 0, "trip"))
    head = f"{found['run']}: {found['state']}, {', '.join(parts)}"
    lines = [f"{head} ({found['reason']})" if found["reason"] else head]
    headings = ("generation", "started", "time", "batch", "steps", "loss", "trips", "peak MiB", "ended by")
    if found["refused"]:
        lines.append(f"  the last start was refused: {found['refused']}")
    rows = [_row(each) for each in found["generations"] if found["state"] == "failed" or not refused_at_start(each)]
    return [*lines, *table(headings, rows, left=(1, 8))] if rows else lines


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    peak, exited = record.get("peak_footprint_mib"), record.get("exit")
    started = _started(record.get("started"))
    cause = str(record.get("cause") or "?")
    return (
        str(record["generation"]), started, duration(record.get("seconds") or 0.0),
        batch(record), steps(record), loss(record.get("loss")),
        "?" if record.get("trips") is None else str(record["trips"]), "?" if peak is None else f"{peak:,.0f}",
        f"{cause} ({exited})" if exited else cause,
    )  # fmt: skip


def _started(started: str | None) -> str:
    """The start as a person reads it; "?" if unknown."""
    return "?" if started is None else moment(datetime.fromisoformat(started).timestamp())
