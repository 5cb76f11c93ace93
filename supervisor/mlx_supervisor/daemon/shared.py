"""What all runs of a daemon share, and observers of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.journal.journal import Journal
from mlx_supervisor.sampling.device_sampler import DeviceSampler
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.state_dir import StateDir
from mlx_supervisor.telemetry import Telemetry

log = structlog.get_logger()


@dataclass(frozen=True)
class Shared:
    """One of each for all runs. `machine_bytes`: memory of the machine, or the control group's limit if less."""

    state: StateDir
    journal: Journal
    telemetry: Telemetry
    sampler: WorkerSampler
    machine_bytes: int
    devices: DeviceSampler


class Observer:
    """Receives the events and notices of a run, on the event loop; for example a display."""

    def on_event(self, run: Run, event: ev.Event) -> None:
        """The machine has applied an event."""

    def on_notice(self, notice: act.Notice) -> None:
        """A notice was issued."""


class Observers:
    """The observers of one run. An observer that raises is dropped."""

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
