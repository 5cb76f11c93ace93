"""What a run in the foreground shows: a live display on a terminal, plain lines elsewhere."""

import asyncio
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_supervisor.cli.time_left import time_left
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import TRAINING, State
from mlx_supervisor.core.memory.growth import Growth
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import counted, duration
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.daemon.step_line import step_line

PLAIN_INTERVAL_S = 2.0
REFRESH_INTERVAL_S = 0.25
STYLES = {act.Severity.INFO: "", act.Severity.WARNING: "yellow", act.Severity.ERROR: "bold red"}
QUIET_KINDS = frozenset({"checkpoint"})
"""Notices too frequent for a terminal; they are in the log."""


class Display(Observer, AbstractContextManager["Display"]):
    """Shows one run while the context lasts."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name

    def on_notice(self, notice: act.Notice) -> None:
        """Print every notice but the quiet ones."""
        if notice.kind not in QUIET_KINDS:
            clock = time.strftime("%H:%M:%S")
            self.console.print(Text.assemble((f"{clock}  ", "dim"), (notice.text, STYLES[notice.severity])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Plain lines hold nothing open."""


class PlainDisplay(Display):
    """Lines for a log or a pipe: every notice, and a step every `PLAIN_INTERVAL_S`."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console, name)
        self._last_s = 0.0

    def on_event(self, run: Run, event: ev.Event) -> None:
        """Print a step when the interval since the last one is over, and the final step always."""
        if not isinstance(event, ev.StepReport) or event is not run.last_step:
            return
        if event.at_s - self._last_s >= PLAIN_INTERVAL_S or event.step >= run.history.target_steps:
            self._last_s = event.at_s
            self.console.print(step_line(run, event))


class LiveDisplay(Display):
    """A block at the bottom of the terminal, redrawn four times a second; notices scroll above it."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console, name)
        self._run: Run | None = None
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> "LiveDisplay":
        self._live.start()
        self._task = asyncio.get_running_loop().create_task(self._refresh())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
        self._live.stop()

    def on_event(self, run: Run, event: ev.Event) -> None:
        """Keep what the next redraw needs."""
        self._run = run

    async def _refresh(self) -> None:
        while True:
            if self._run is not None:
                self._live.update(self._block(self._run), refresh=True)
            await asyncio.sleep(REFRESH_INTERVAL_S)

    def _block(self, run: Run) -> RenderableType:
        history = run.history
        state = "restarting" if run.state is State.STARTING and history.generation > 1 else run.state.value
        title = Text.assemble((f"{self.name} ", "bold"), f"{state}, generation {history.generation}")
        rows = Table.grid(padding=(0, 2))
        rows.add_row("progress", _bar(history.highest_step, history.target_steps), Text(progress_text(run)))
        sample = run.last_sample
        limit = run.policy.memory.limit_bytes
        used = 0 if sample is None else sample.footprint_bytes
        rows.add_row("memory", _bar(used, limit), Text(memory_text(used, limit, run.breaker.growth)))
        facts = f"{counted(history.trips, 'trip')}, breaker {run.breaker.state.value}, loss {_loss(run)}"
        rows.add_row("batch", Text(_batch(run.last_step)), Text(facts))
        if run.waiting_for:
            rows.add_row("waiting", Text(f"for {run.waiting_for}"))
        return Group(title, rows)


def progress_text(run: Run) -> str:
    """The step; while the worker trains also its speed and the time left, as far as known."""
    history = run.history
    parts = [f"step {history.highest_step}/{history.target_steps or '?'}"]
    speed = run.rate.speed(history.target_steps)
    if speed is not None and run.state in TRAINING:
        parts += [f"{speed.per_s:,.0f} {speed.unit}/s", time_left(speed.left_s)]
    return ", ".join(filter(None, parts))


def memory_text(used_bytes: int, limit_bytes: int, growth: Growth) -> str:
    """Footprint and limit; then, as far as known, growth per step, its causes, and when it reaches the limit."""
    parts = [f"{used_bytes / MIB:,.0f} of {limit_bytes / MIB:,.0f} MiB"]
    slope = growth.bytes_per_step
    if slope is not None and slope > 0:
        causes = [f"{cause} {part / MIB:.1f}" for cause, part in growth.by_cause.items() if part > 0]
        shares = f" ({', '.join(causes)})" if causes else ""
        parts.append(f"{'leak' if growth.verdict else 'growth'} {slope / MIB:.1f} MiB/step{shares}")
    if growth.steps_left is not None and growth.seconds_left is not None:
        parts.append(f"limit in {counted(round(growth.steps_left), 'step')} ({duration(growth.seconds_left)})")
    return ", ".join(parts)


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=min(done, max(total, 1)), width=30)


def _batch(step: ev.StepReport | None) -> str:
    if step is None:
        return "?"
    return f"micro-batch {step.batch_size}, effective batch {step.batch_size * step.accumulation}"


def _loss(run: Run) -> str:
    history = run.history
    loss = "?" if history.loss is None else f"{history.loss:.4f}"
    if history.validation_loss is None:
        return loss
    return f"{loss}, validation loss {history.validation_loss:.4f} at step {history.validation_step}"
