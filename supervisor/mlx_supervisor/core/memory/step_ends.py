"""The worker's footprint at the end of each step, also of steps shorter than the sampling interval.

The samples from outside are the truth. Between two of them, the worker's own reading in each step report says how
memory moved; its level comes from the samples. A reading that is missing, wrong or stuck therefore never hides growth
for longer than a few samples: the samples' distance to it grows.
"""

from collections import deque

from mlx_supervisor.core import events as ev

GAP_SAMPLES = 5
"""The lowest of this many last distances counts: a sample within a step shows memory that the step's end has freed."""


class StepEnds:
    """One per generation."""

    def __init__(self) -> None:
        self._gaps: deque[int] = deque(maxlen=GAP_SAMPLES)
        self.children_bytes = 0
        """At the last sample."""

    def leader_bytes(self, report: ev.StepReport, sample: ev.Sample | None) -> int | None:
        """The group leader's footprint at the end of this step. `sample`: the last one within it, or None.

        None: neither a sample nor an own reading.
        """
        own_bytes = report.process_bytes
        if sample is not None:
            self.children_bytes = sample.children_bytes
            leader_bytes = sample.footprint_bytes - sample.children_bytes
            if not own_bytes:
                return leader_bytes
            self._gaps.append(leader_bytes - own_bytes)
        return own_bytes + min(self._gaps) if own_bytes and self._gaps else None
