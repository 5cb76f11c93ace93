"""The account of a run that a person reads at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GENERATIONS_SHOWN = 12


def print_summary(console: Console, summary: Mapping[str, Any], folder: Path, again: str) -> None:
    """What happened, life by life, and how to go on. `again`: the command that continues the run."""
    outcome = str(summary["outcome"])
    console.print()
    console.print(
        f"{summary['run']}: {outcome} at step {summary['step']} of {summary['target_steps']}: {summary['reason']}."
    )
    console.print(_figures(summary))
    lives = summary["generations"]
    if lives:
        console.print(_table(lives[-GENERATIONS_SHOWN:]))
    if len(lives) > GENERATIONS_SHOWN:
        console.print(f"({len(lives) - GENERATIONS_SHOWN} earlier lives are in summary.json)")
    console.print(f"Account: {folder / 'summary.json'}, logs: {folder / 'logs'}, checkpoints: {folder / 'checkpoints'}")
    if outcome == "stopped":
        console.print(f"Go on with: {again}")


def _figures(summary: Mapping[str, Any]) -> str:
    figures = [f"{summary['trips']} trips", f"{summary['replayed_steps']} steps replayed"]
    if summary["loss"] is not None:
        figures.insert(0, f"loss {summary['loss']:.4f}")
    if summary["goodput"] is not None:
        figures.append(f"goodput {summary['goodput']:.0%}")
    if summary["checkpoint_stall_fraction"] is not None:
        figures.append(f"{summary['checkpoint_stall_fraction']:.1%} of training time spent on checkpoints")
    if summary["weights_sha256"]:
        figures.append(f"weights {summary['weights_sha256'][:12]}…")
    return ", ".join(figures) + "."


def _table(lives: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("life", "batch", "steps", "seconds", "peak MiB"):
        table.add_column(heading, justify="right")
    table.add_column("ended")
    for life in lives:
        batch = "?" if life.get("batch_size") is None else f"{life['batch_size']} × {life.get('accumulation') or '?'}"
        steps = "none" if life.get("first_step") is None else f"{life['first_step']}–{life['last_step']}"
        table.add_row(
            str(life["generation"]),
            batch,
            steps,
            f"{life.get('seconds', 0):.1f}",
            f"{life.get('peak_footprint_mib', 0):,.0f}",
            f"{life.get('cause')} ({life.get('ended')})",
        )
    return table
