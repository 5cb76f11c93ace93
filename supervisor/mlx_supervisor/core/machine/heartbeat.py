"""Is the worker getting anywhere? Judged by its progress, never by its being alive."""

from mlx_supervisor.core.events import Phase

LEAST_S = 60.0
"""However fast the steps, silence shorter than this is no hang."""
SLOWEST_TIMES = 20.0
"""Silence of this many of the slowest step seen is a hang."""
FIRST_STEP_S = 300.0
"""Before a step's duration is known: compilation, and a first step of unknown length."""
OTHER_PHASE_S = 600.0
"""Without a sign of progress inside an evaluation or a checkpoint."""


class Heartbeat:
    """One life of a worker. All times in seconds of the events' clock."""

    def __init__(self, hang_timeout_s: float | None) -> None:
        self._fixed_s = hang_timeout_s
        self._slowest_s: float | None = None
        self._phase = Phase.TRAIN
        self._last_s: float | None = None
        self._pardoned_s = 0.0

    def progress(self, at_s: float, phase: Phase, step_s: float | None = None) -> None:
        """The worker got somewhere; `step_s` is how long the step took, where it was one."""
        self._last_s = max(at_s, self._last_s or at_s)
        self._phase = phase
        if step_s is not None:
            self._slowest_s = max(step_s, self._slowest_s or 0.0)

    def pardon(self, seconds: float) -> None:
        """Any silence may be longer by this: the worker was asked for what takes so long. 0: it has answered."""
        self._pardoned_s = seconds

    def checkpointed(self, at_s: float) -> None:
        """A checkpoint is done. It may have been written beside an evaluation, which then still goes on."""
        self.progress(at_s, Phase.TRAIN if self._phase is Phase.CHECKPOINT else self._phase)

    @property
    def allowance_s(self) -> float:
        """How long silence is accepted now."""
        return self._usual_s + self._pardoned_s

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
        """When the worker counts as hung; None before its first sign of life."""
        return None if self._last_s is None else self._last_s + self.allowance_s
