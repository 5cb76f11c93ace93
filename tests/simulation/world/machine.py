"""The real machine, in a form that a planted bug can change."""

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run


class SimulatedRun(Run):
    """A run's state with the function that changes it."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        return apply(self, event)
