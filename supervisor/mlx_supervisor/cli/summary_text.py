"""The summary that a person reads at the end of a run."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_supervisor.cli.text import batch, steps
from mlx_supervisor.core.diagnosis.causes import refused_at_start
from mlx_supervisor.core.words import counted, duration, loss_text, validation_text
from mlx_supervisor.wire.owner import owner_of

GENERATIONS_SHOWN = 12
TABLE_WIDTH = 110
"""A pipe has no width; rich would break lines at 80."""
LEAST_STALL_SHOWN = 0.0005
ALL_DONE = "all steps done"
"""The reason of a completed run, which needs none."""


def print_summary(console: Console, summary: Mapping[str, Any], folder: Path, resume: str) -> None:
    """The outcome, the figures, and a table of the generations. `resume`: the command that resumes the run."""
    outcome, folder = str(summary["outcome"]), folder.absolute()
    console.print()
    console.print(_ending(summary))
    for figures in (_losses(summary), _figures(summary)):
        if figures:
            console.print(f"{figures[0].upper()}{figures[1:]}.")
    generations = [each for each in summary["generations"] if not refused_at_start(each)]
    if generations:
        wide = console if console.is_terminal else Console(file=console.file, width=max(console.width, TABLE_WIDTH))
        wide.print(_table(generations[-GENERATIONS_SHOWN:]))
    if len(generations) > GENERATIONS_SHOWN:
        console.print(f"({len(generations) - GENERATIONS_SHOWN} earlier generations are in summary.json)")
    if outcome == "completed":
        for line in _results(summary, folder):
            console.print(line)
    console.print(f"Summary, logs and checkpoints: {folder}")
    if outcome == "failed" and generations:
        console.print(f"The worker's errors: {folder / 'logs' / 'stderr.log'}")
    if outcome == "stopped":
        console.print(f"Resume with: {resume}")


def _results(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Where the weights are, or the command that writes them; also for the best checkpoint if it is not the last."""
    export = _export(summary, folder)
    lines = [_result(summary, folder) if summary.get("exported_to") else f"No export: `{export}` writes the weights."]
    best = summary.get("best_validation_step")
    if best and best < summary["step"] and (folder / "checkpoints" / f"step-{best:09d}").is_dir():
        lines.append(f"The best validation was at step {best}: `{export} --step {best}` writes its weights.")
    return lines


def _result(summary: Mapping[str, Any], folder: Path) -> str:
    """The folder of the adapters; if they were deleted or replaced since, the command that writes them again."""
    result = Path(summary["exported_to"])
    owner = owner_of(result)
    if owner is not None and owner.folder not in ("", str(folder.resolve())):
        return f"Result: {result} now belongs to {owner}; write this run's again with: {_export(summary, folder)}"
    try:
        found = any(not entry.name.startswith(".") for entry in result.iterdir())
    except OSError:
        found = False
    again = "" if found else f" is empty; write it again with: {_export(summary, folder, '-o', str(result))}"
    return f"Result: {result}{again}"


def _export(summary: Mapping[str, Any], folder: Path, *options: str) -> str:
    """The command that writes the adapters of the run's newest checkpoint."""
    return shlex.join(["mlx-supervisor", "export", summary["run"], "--state-dir", str(folder.parents[1]), *options])


def _ending(summary: Mapping[str, Any]) -> str:
    """`night: completed at step 20 of 20.`, with the reason where there is one to know."""
    step, target, reason = summary["step"], summary["target_steps"], str(summary["reason"]).rstrip(".")
    of = "" if not target else f" of {target}" if step <= target else f", past the target of {target}"
    at = "before the first step" if not step else f"at step {step}{of}"
    why = "" if reason == ALL_DONE else f": {reason}"
    return f"{summary['run']}: {summary['outcome']} {at}{why}."


def was_refused(summary: Mapping[str, Any]) -> bool:
    """Whether the last worker refused its job before its first update: the notice says why, and there is no more."""
    generations = summary["generations"]
    if summary["outcome"] != "failed" or not generations:
        return False
    return refused_at_start(generations[-1])


def _losses(summary: Mapping[str, Any]) -> str:
    """Losses and speed, as far as known."""
    loss, smoothed, validation = (summary.get(key) for key in ("loss", "smoothed_loss", "validation_loss"))
    figures = []
    if loss is not None:
        figures.append(f"loss {loss_text(loss)}" + ("" if smoothed is None else f" (smoothed {loss_text(smoothed)})"))
    if validation is not None:
        best, best_step = summary.get("best_validation_loss"), summary.get("best_validation_step") or 0
        figures.append(f"validation {validation_text(validation, summary['validation_step'], best, best_step)}")
    if summary.get("test_loss") is not None:
        figures.append(f"test {loss_text(summary['test_loss'])}")
    if summary.get("tokens_per_second"):
        figures.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(figures)


def _figures(summary: Mapping[str, Any]) -> str:
    restarts, trips = summary.get("restarts", 0), summary["trips"]
    figures = [counted(trips, "memory trip")] if trips else []
    if restarts:
        figures += [counted(restarts, "restart"), f"{counted(summary['replayed_steps'], 'step')} replayed"]
    if summary["goodput"] is not None:
        figures.append(f"{100 * summary['goodput']:.0f} % of the time spent training")
    if (summary["checkpoint_stall_fraction"] or 0.0) >= LEAST_STALL_SHOWN:
        figures.append(f"{100 * summary['checkpoint_stall_fraction']:.1f} % of training time spent on checkpoints")
    if summary["weights_sha256"]:
        figures.append(f"weights {summary['weights_sha256'][:12]}…")
    return ", ".join(figures)


def _table(generations: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    on_device = any(record.get("peak_device_mib") for record in generations)
    for heading in ("generation", "batch", "steps", "time", "peak MiB", *(["device MiB"] if on_device else [])):
        table.add_column(heading, justify="right")
    table.add_column("ended")
    for record in generations:
        table.add_row(
            str(record["generation"]),
            batch(record),
            steps(record),
            duration(record.get("seconds", 0)),
            f"{record.get('peak_footprint_mib', 0):,.0f}",
            *([f"{record.get('peak_device_mib', 0):,.0f}"] if on_device else []),
            f"{record.get('cause')} ({record.get('ended')})",
        )
    return table
