"""One run as a state machine: events in, actions out, by the table."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import Action
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import AT_REST
from mlx_supervisor.core.machine.table import TABLE


def apply(run: Run, event: ev.Event) -> list[Action]:
    """The actions that answer `event`. Raises only for bugs of the supervisor, never for unexpected events."""
    run.out = []
    rule = TABLE[run.state].get(type(event))
    stale = isinstance(event, ev.WorkerEvent) and event.generation != run.history.generation
    stale = stale and not isinstance(event, ev.Recovered)
    if rule is None or stale or (isinstance(event, ev.Tick) and not _is_due(run, event.at_s)):
        return []
    if isinstance(event, ev.Paused) and run.counted_until_s is not None:
        run.counted_until_s += event.seconds
    _count_active(run, event.at_s)
    if isinstance(event, ev.Command):
        hurried = run.suspending and event.kind is CommandKind.KILL
        run.suspending = event.kind is CommandKind.SUSPEND or hurried
    handler, run.allowed = rule
    handler(run, event)
    run.note_activity(event.at_s)
    return run.out


def _is_due(run: Run, at_s: float) -> bool:
    deadline_s = run.next_deadline()
    return deadline_s is not None and at_s >= deadline_s


def _count_active(run: Run, at_s: float) -> None:
    if run.counted_until_s is not None and run.state not in AT_REST:
        run.history.add_active(max(at_s - run.counted_until_s, 0.0))
    run.counted_until_s = max(at_s, run.counted_until_s or at_s)
