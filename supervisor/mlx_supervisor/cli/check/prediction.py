"""Memory and time at batch sizes that were not measured: both are linear in the batch size at a fixed length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

RUN_OVER_PROBE = 1.025
"""A run's peak over a measurement's: shapes of other batches, checkpoints being written. Measured: 1.02 to 1.03."""


@dataclass(frozen=True)
class Point:
    """One batch size. `peak_bytes`: of the process group, `device_bytes`: MLX's highest active memory.

    `measured`: else it follows from the measured ones.
    """

    size: int
    peak_bytes: float
    device_bytes: float
    update_s: float
    measured: bool = True


@dataclass(frozen=True)
class Bound:
    """`limit_bytes`: of the process group; `share` of it may be used. `device_limit_bytes`: a device's own memory."""

    limit_bytes: int
    share: float
    device_limit_bytes: int | None = None

    def fits(self, point: Point) -> bool:
        """Whether a run at this size is expected not to trip."""
        if RUN_OVER_PROBE * point.peak_bytes > self.share * self.limit_bytes:
            return False
        return self.device_limit_bytes is None or point.device_bytes <= self.device_limit_bytes


class Prediction:
    """From at least one measured point. Sizes beyond the measured ones need two points."""

    def __init__(self, measured: Sequence[Point]) -> None:
        assert measured
        self.measured = {point.size: point for point in measured}

    def at(self, size: int) -> Point | None:
        """The measured point, or the one on the line through the measured ones; None if there is no line."""
        if size in self.measured:
            return self.measured[size]
        if len(self.measured) < 2:
            return None
        floor_bytes = max((point.peak_bytes for point in self.measured.values() if point.size < size), default=0.0)
        point = self.on_line(size)
        return replace(point, peak_bytes=max(point.peak_bytes, floor_bytes))

    def on_line(self, size: int) -> Point:
        """The point on the line, also where the size was measured."""
        points = list(self.measured.values())
        peak_bytes, device_bytes, update_s = (
            _line([point.size for point in points], [float(getattr(point, name)) for point in points], size)
            for name in ("peak_bytes", "device_bytes", "update_s")
        )
        return Point(size, peak_bytes, device_bytes, update_s, measured=False)

    def largest(self, bound: Bound, at_most: int) -> int:
        """The largest size, up to `at_most`, that fits; 0 if none does. Larger sizes never need less."""
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            point = self.at(middle)
            if point is not None and bound.fits(point):
                low = middle
            else:
                high = middle - 1
        return low


def _line(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """The least-squares line through the points, at `size`; it never falls."""
    mean_size, mean = sum(sizes) / len(sizes), sum(values) / len(values)
    spread = sum((each - mean_size) ** 2 for each in sizes)
    slope = sum((each - mean_size) * (value - mean) for each, value in zip(sizes, values, strict=True)) / spread
    return mean + max(slope, 0.0) * (size - mean_size)


def shown_sizes(requested: int, largest: int, at_most: int) -> list[int]:
    """Powers of two up to the first that does not fit, the requested size and the largest."""
    sizes, size = {requested, largest, min(largest + 1, at_most)}, 1
    while size <= at_most:
        sizes.add(size)
        if size > max(largest, requested):
            break
        size *= 2
    return sorted(each for each in sizes if each >= 1)
