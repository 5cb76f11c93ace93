"""A pause of the supervisor: time in which it did not run counts for no deadline."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import Severity
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.words import duration

MOVED = frozenset({S.STARTING, S.RELIEVING, S.DRAINING, S.TERMINATING, S.KILLING})
"""States whose deadline is an allowance for the worker, which may have been paused, too. A wait may end on time."""


def on_paused(run: Run, event: ev.Paused) -> None:
    text = f"The supervisor did not run for {duration(event.seconds)} (the machine or its container was paused)"
    run.say("paused", f"{text}: the worker's deadlines are moved by as much.", Severity.WARNING)
    run.heartbeat.pause(event.seconds)
    if run.state in MOVED and run.deadline_s is not None:
        run.deadline_s += event.seconds
