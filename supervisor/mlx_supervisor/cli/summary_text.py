"""The summary that a person reads at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.words import counted, duration

GENERATIONS_SHOWN = 12


def print_summary(console: Console, summary: Mapping[str, Any], folder: Path, resume: str) -> None:
    """The outcome, the figures, and a table of the generations. `resume`: the command that resumes the run."""
    outcome = str(summary["outcome"])
    console.print()
    console.print(
        f"{summary['run']}: {outcome} at step {summary['step']} of {summary['target_steps']}: {summary['reason']}."
    )
    console.print(_figures(summary))
    generations = summary["generations"]
    if generations:
        console.print(_table(generations[-GENERATIONS_SHOWN:]))
    if len(generations) > GENERATIONS_SHOWN:
        console.print(f"({len(generations) - GENERATIONS_SHOWN} earlier generations are in summary.json)")
    console.print(f"Summary: {folder / 'summary.json'}, logs: {folder / 'logs'}, checkpoints: {folder / 'checkpoints'}")
    if outcome == "stopped":
        console.print(f"Resume with: {resume}")


def was_refused(summary: Mapping[str, Any]) -> bool:
    """Whether the last worker refused its job before its first update: the notice says why, and there is no more."""
    generations = summary["generations"]
    if summary["outcome"] != "failed" or not generations:
        return False
    last = generations[-1]
    return last.get("cause") == Cause.REFUSED.value and last.get("first_step") is None


def _figures(summary: Mapping[str, Any]) -> str:
    figures = [counted(summary["trips"], "trip"), f"{counted(summary['replayed_steps'], 'step')} replayed"]
    if summary["loss"] is not None:
        figures.insert(0, f"loss {summary['loss']:.4f}")
    if summary["goodput"] is not None:
        figures.append(f"{summary['goodput']:.0%} of the time spent training")
    if summary["checkpoint_stall_fraction"] is not None:
        figures.append(f"{summary['checkpoint_stall_fraction']:.1%} of training time spent on checkpoints")
    if summary["weights_sha256"]:
        figures.append(f"weights {summary['weights_sha256'][:12]}…")
    return ", ".join(figures) + "."


def _table(generations: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("generation", "batch", "steps", "time", "peak MiB"):
        table.add_column(heading, justify="right")
    table.add_column("ended")
    for record in generations:
        size, accumulation = record.get("batch_size"), record.get("accumulation") or "?"
        table.add_row(
            str(record["generation"]),
            "?" if size is None else f"{size} × {accumulation}",
            "none" if record.get("first_step") is None else f"{record['first_step']}–{record['last_step']}",
            duration(record.get("seconds", 0)),
            f"{record.get('peak_footprint_mib', 0):,.0f}",
            f"{record.get('cause')} ({record.get('ended')})",
        )
    return table
