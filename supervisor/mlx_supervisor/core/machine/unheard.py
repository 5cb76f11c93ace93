"""What a generation left on disk counts, also where no report of it arrived."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run


def count_unheard(run: Run, event: ev.Exited) -> None:
    """Count the updates and the checkpoint of the generation that has ended."""
    current, past = run.current, run.history
    if current is not None and event.generation == current.generation and event.last_step > (current.last_step or 0):
        past.add_unheard(event.first_step, event.last_step)
        current.first_step = current.first_step or event.first_step
        current.last_step = event.last_step
        if run.bye is not None and run.bye.step == event.last_step and run.bye.loss is not None:
            past.loss = run.bye.loss
    past.durable_step = max(past.durable_step, min(event.durable_step, past.highest_step))
