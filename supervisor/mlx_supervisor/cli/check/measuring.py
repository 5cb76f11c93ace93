"""Which batch sizes are measured, each in its own process: small ones, the requested one, the largest that fits."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mlx_supervisor.cli.check.prediction import Bound, Point, Prediction
from mlx_supervisor.cli.check.probe import Probe
from mlx_supervisor.core.words import size as shown
from mlx_supervisor.wire.check import MeasureReport

SMALL = (1, 2, 4)
VERIFICATIONS = 6
OFF_LINE = 1.03
"""A measured size may need this much more than the line through the larger ones says."""

Measure = Callable[[int], Awaitable[Probe[MeasureReport]]]


@dataclass
class Measured:
    """`largest`: the largest batch size that fits, `at_most` the data set allows; 0: none. `over`: sizes that were
    killed at the limit. `notes`: what the figures leave out. `problem`: why measuring failed."""

    bound: Bound
    at_most: int
    accumulation: int = 1
    points: list[Point] = field(default_factory=list)
    over: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    largest: int = 0
    problem: str = ""

    @property
    def prediction(self) -> Prediction | None:
        """None if nothing was measured."""
        return Prediction(self.points) if self.points else None


async def measure_sizes(
    measure: Measure, bound: Bound, requested: int, at_most: int, accumulation: int = 1
) -> Measured:
    """Measure as many sizes as the answer needs: at most `SMALL`, the requested one, and `VERIFICATIONS`."""
    found = Measured(bound, at_most, accumulation)
    for size in SMALL:
        if size <= at_most and not await _add(found, measure, size):
            break
    await _repeat_disturbed(found, measure)
    for _ in range(VERIFICATIONS):
        candidate = _largest(found)
        if found.problem or candidate == 0 or candidate in _sizes(found):
            break
        await _add(found, measure, candidate)
    if not found.problem and requested not in {*_sizes(found), *found.over} and requested <= _largest(found):
        await _add(found, measure, requested)
    found.largest = _largest(found)
    if found.largest not in _sizes(found):  # the line misleads: name what was measured
        found.largest = _largest_measured(found)
    return found


def _sizes(found: Measured) -> set[int]:
    return {point.size for point in found.points}


def _largest_measured(found: Measured) -> int:
    return max((point.size for point in found.points if found.bound.fits(point)), default=0)


def _largest(found: Measured) -> int:
    """By the line; once a size was killed at the limit, at most halfway from the largest measured one that fits."""
    if found.prediction is None:
        return 0
    if not found.over:
        return found.prediction.largest(found.bound, found.at_most)
    fits, over = _largest_measured(found), min(found.over)
    return min(found.prediction.largest(found.bound, over - 1), (fits + over) // 2) if over - fits > 1 else fits


async def _repeat_disturbed(found: Measured, measure: Measure) -> None:
    """Measure a size again that needed more than a larger one, or than the line through the larger ones says: on the
    CPU, MLX starts a compiler for kernels that no process used before, and the compiler's memory was counted."""
    for point in list(found.points):
        larger = [each for each in found.points if each.size > point.size]
        if not larger or found.problem:
            continue
        expected_bytes = larger[0].peak_bytes
        if len(larger) > 1:
            expected_bytes = OFF_LINE * Prediction(larger).on_line(point.size).peak_bytes
        if point.peak_bytes > expected_bytes:
            found.points.remove(point)
            await _add(found, measure, point.size)
    found.points.sort(key=lambda point: point.size)


async def _add(found: Measured, measure: Measure, size: int) -> bool:
    """Measure one size. Returns whether larger ones are worth a try."""
    probe = await measure(size)
    if probe.over_limit:
        found.over.append(size)
        return False
    if probe.short_of_memory:
        found.notes.append(f"Batch size {size} was not measured to its end: too little memory is available now.")
        found.over.append(size)
        return False
    report = probe.report
    if report is None or report.problems:
        found.problem = report.problems[0] if report and report.problems else f"the measurement ended: {probe.ended}"
        found.notes += probe.output
        return False
    found.points.append(Point(size, probe.peak_after(report.began_s), report.peak_bytes, report.update_s))
    _note(found, probe, report)
    return found.bound.fits(found.points[-1])


def _note(found: Measured, probe: Probe[MeasureReport], report: MeasureReport) -> None:
    for left_out in (
        "The evaluation was measured for its first 10 s only." if report.evaluated and not report.evaluated_all else "",
        "" if report.saved else "No checkpoint's snapshot was held meanwhile.",
        f"Loading needs more than the updates: {shown(probe.peak_bytes)}."
        if probe.peak_bytes > 1.05 * probe.peak_after(report.began_s)
        else "",
    ):
        if left_out and left_out not in found.notes:
            found.notes.append(left_out)
