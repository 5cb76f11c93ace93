"""How much memory one generation gains with each update, judged from few updates.

`core/memory/growth.py` needs many updates for a verdict. A leak that reaches the limit within a handful
gets none there; compared with the generation before, at another micro-batch, even a few updates say enough.
"""

from dataclasses import dataclass

from mlx_supervisor.core import events as ev

LEAST_UPDATES = 3
STEADY_SHARE = 0.8
"""Of the updates, how many must end with more memory than the one before."""
LEAST_RISE_SHARE = 0.1
"""The rise of a generation, as a share of the limit, below which it explains no death."""


@dataclass(slots=True)
class UpdateGrowth:
    """Memory at the end of each update, without MLX's cache. A change of the micro-batch starts it afresh."""

    size: int | None = None
    updates: int = 0
    rises: int = 0
    first_bytes: int = 0
    last_bytes: int = 0

    def add(self, report: ev.StepReport, sample: ev.Sample | None) -> None:
        """One update. `sample`: the latest, for a worker that does not report its own footprint."""
        held_bytes = report.process_bytes or (0 if sample is None else sample.footprint_bytes)
        bytes_now = report.active_bytes if report.device_limit_bytes else max(held_bytes - report.cache_bytes, 0)
        if report.batch_size != self.size:
            self.size, self.updates, self.rises, self.first_bytes = report.batch_size, 0, 0, bytes_now
        elif bytes_now > self.last_bytes:
            self.rises += 1
        self.updates += 1
        self.last_bytes = bytes_now

    def bytes_per_update(self, limit_bytes: int) -> float | None:
        """The average growth; None if it is not steady, too small to explain a death, or of too few updates."""
        rise_bytes = self.last_bytes - self.first_bytes
        gaps = self.updates - 1
        if (
            self.updates < LEAST_UPDATES
            or self.rises < STEADY_SHARE * gaps
            or rise_bytes < LEAST_RISE_SHARE * limit_bytes
        ):
            return None
        return rise_bytes / gaps
