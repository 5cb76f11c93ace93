"""The summary of a run for programs: `summary.json`, and the last line of `run --json`."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from mlx_supervisor.core.history import RunHistory

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two attempts to write a summary that the disk refused; the pause doubles."""

log = structlog.get_logger()


def summary_of(run: str, history: RunHistory, generations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary's keys, in order. `generations`: the records of all generations, oldest first."""
    return {
        "run": run,
        "outcome": history.outcome,
        "reason": history.reason,
        "step": history.highest_step,
        "target_steps": history.target_steps,
        "loss": _finite(history.loss),
        "smoothed_loss": history.smoothed_loss,
        "validation_loss": _finite(history.validation_loss),
        "validation_step": None if history.validation_loss is None else history.validation_step,
        "best_validation_loss": history.best_validation_loss,
        "best_validation_step": None if history.best_validation_loss is None else history.best_validation_step,
        "test_loss": history.test_loss,
        "tokens_per_second": None if (speed := history.tokens_per_second) is None else round(speed, 1),
        "restarts": history.restarts,
        "metrics": history.metrics,
        "validation_metrics": history.validation_metrics,
        "trips": history.trips,
        "replayed_steps": history.replayed_steps,
        "goodput": _rounded(history.goodput),
        "checkpoint_stall_fraction": _rounded(history.checkpoint_stall_fraction),
        "weights_sha256": history.weights_sha256,
        "exported_to": history.exported_to or None,
        "generations": [dict(record) for record in generations],
    }


class SummaryFile:
    """`summary.json` of a run's folder. What the disk refuses is written later, with growing pauses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._refused: Mapping[str, Any] | None = None
        self._pause_s = self._next_s = 0.0

    def write(self, summary: Mapping[str, Any]) -> None:
        """Replace the file. Raises OSError; then `retry` writes it later."""
        try:
            write_summary(self._folder, summary)
        except OSError:
            self._refused, self._pause_s = summary, FIRST_PAUSE_S
            self._next_s = time.monotonic() + self._pause_s
            raise
        self._refused = None

    def retry(self, *, last: bool = False) -> None:
        """Write a refused summary if the pause is over, or for the last time."""
        if self._refused is None or (time.monotonic() < self._next_s and not last):
            return
        try:
            write_summary(self._folder, self._refused)
        except OSError:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._next_s = time.monotonic() + self._pause_s
        else:
            self._refused = None
            log.info("summary_written_late", folder=str(self._folder))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Replace `summary.json` atomically. Raises OSError; then the old file stays, and nothing is left beside it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been deleted during the run
    temporary = folder / ".summary.json.tmp"
    try:
        with temporary.open("w") as file:
            os.fchmod(file.fileno(), 0o600)
            json.dump(summary, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "summary.json")
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
