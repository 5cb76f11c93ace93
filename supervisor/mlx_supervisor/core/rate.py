"""How fast the worker trains."""

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from mlx_supervisor.core.events import StepReport

WINDOW_STEPS = 20
WINDOW_S = 30.0
SHORTEST_S = 0.05
"""Reports that arrive together say nothing about the rate."""


class Speed(NamedTuple):
    """Tokens per second, or samples where the task counts no tokens; seconds left until the target, None if unknown."""

    per_s: float
    unit: str
    left_s: float | None


class Rate:
    """Tokens and steps of one generation over wall time, in the last 20 steps or 30 s, whichever is longer.

    The `seconds` of a report don't serve: updates overlap, and evaluations and checkpoints lie between them.
    """

    def __init__(self) -> None:
        # reports with the totals so far, spaced so that short updates need no more memory than long ones
        self._marks: deque[StepReport] = deque(maxlen=WINDOW_STEPS + 1)
        self._last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Count an update. A repeated report is ignored."""
        if self._last is not None:
            if report.step <= self._last.step:
                return
            tokens, samples = self._last.tokens + report.tokens, self._last.samples + report.samples
            report = replace(report, tokens=tokens, samples=samples)
        self._last = report
        if not self._marks or report.at_s - self._marks[-1].at_s >= WINDOW_S / WINDOW_STEPS:
            self._marks.append(report)

    def speed(self, target_steps: int) -> Speed | None:
        """Now, with the time until the update `target_steps` (0: not known yet); None before two updates."""
        if self._last is None:
            return None
        first, last = self._marks[0], self._last
        elapsed_s = last.at_s - first.at_s
        if elapsed_s < SHORTEST_S:
            return None
        unit, count = "tokens", last.tokens - first.tokens
        if count == 0:
            unit, count = "samples", last.samples - first.samples
        left_s = max(target_steps - last.step, 0) * elapsed_s / (last.step - first.step)
        return Speed(count / elapsed_s, unit, left_s if target_steps else None)
