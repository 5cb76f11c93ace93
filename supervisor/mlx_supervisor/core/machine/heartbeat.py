"""Hang detection: a worker must make progress; being alive is not enough."""

from mlx_supervisor.core.events import Phase

LEAST_S = 60.0
"""A shorter silence is never a hang, however fast the steps."""
SLOWEST_TIMES = 20.0
"""A silence of this many times the slowest step so far is a hang."""
FIRST_STEP_S = 300.0
"""Allowance before the first step: it compiles, and its duration is unknown."""
OTHER_PHASE_S = 600.0
"""Allowance without progress inside an evaluation or a checkpoint."""


class Heartbeat:
    """One per generation. All times in seconds of the events' clock."""

    def __init__(self, hang_timeout_s: float | None) -> None:
        self._fixed_s = hang_timeout_s
        self._slowest_s: float | None = None
        self._phase = Phase.TRAIN
        self._last_s: float | None = None
        self._extended_s = 0.0

    def progress(self, at_s: float, phase: Phase, step_s: float | None = None) -> None:
        """The worker made progress. `step_s`: the duration, if it was a step."""
        self._last_s = max(at_s, self._last_s or at_s)
        self._phase = phase
        if step_s is not None:
            self._slowest_s = max(step_s, self._slowest_s or 0.0)

    def pause(self, seconds: float) -> None:
        """The supervisor did not run for `seconds`: that time is no silence."""
        if self._last_s is not None:
            self._last_s += seconds

    def extend(self, seconds: float) -> None:
        """Allow this much more silence, for a request that takes so long. 0: it was answered."""
        self._extended_s = seconds

    def checkpointed(self, at_s: float) -> None:
        """A checkpoint is done. An evaluation that runs at the same time continues."""
        self.progress(at_s, Phase.TRAIN if self._phase is Phase.CHECKPOINT else self._phase)

    @property
    def allowance_s(self) -> float:
        """The longest silence accepted now."""
        return self._usual_s + self._extended_s

    @property
    def _usual_s(self) -> float:
        if self._fixed_s is not None:
            return self._fixed_s
        if self._phase is not Phase.TRAIN:
            return OTHER_PHASE_S
        if self._slowest_s is None:
            return FIRST_STEP_S
        return max(LEAST_S, SLOWEST_TIMES * self._slowest_s)

    @property
    def deadline_s(self) -> float | None:
        """When the worker counts as hung; None before its first progress."""
        return None if self._last_s is None else self._last_s + self.allowance_s
