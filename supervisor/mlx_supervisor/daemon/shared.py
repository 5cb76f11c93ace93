"""What all runs of a daemon use together, and who watches them live."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.journal.journal import Journal
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.state_dir import StateDir
from mlx_supervisor.telemetry import Telemetry

log = structlog.get_logger()


@dataclass(frozen=True)
class Shared:
    """One of each for all runs. `machine_bytes`: the memory of the machine, or of the control group."""

    state: StateDir
    journal: Journal
    telemetry: Telemetry
    sampler: WorkerSampler
    machine_bytes: int


class Observer:
    """Something that shows a run live: a display. Called on the event loop."""

    def on_event(self, run: Run, event: ev.Event) -> None:
        """After the machine has applied it."""

    def on_notice(self, notice: act.Notice) -> None:
        """A notice was issued."""


class Observers:
    """The observers of one run. One that fails is dropped: the run matters more."""

    def __init__(self, run: str, observers: Sequence[Observer]) -> None:
        self._run = run
        self._observers = list(observers)

    def show(self, show: Callable[[Observer], None]) -> None:
        """Call each of them. Never raises."""
        for observer in list(self._observers):
            try:
                show(observer)
            except Exception as error:
                self._observers.remove(observer)
                log.error("display_failed", run=self._run, error=repr(error))
