"""What a run in the foreground shows: a live picture on a terminal, plain lines elsewhere."""

import asyncio
import time
from collections import deque
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.daemon.step_line import step_line

PLAIN_INTERVAL_S = 2.0
REFRESH_INTERVAL_S = 0.25
RATE_STEPS = 20
STYLES = {act.Severity.INFO: "", act.Severity.WARNING: "yellow", act.Severity.ERROR: "bold red"}
QUIET_KINDS = frozenset({"checkpoint"})
"""Notices too frequent for a terminal; the log has them."""


class Display(Observer, AbstractContextManager["Display"]):
    """Shows one run while the context lasts."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name

    def on_notice(self, notice: act.Notice) -> None:
        """Every notice but the quiet ones stays on the screen."""
        if notice.kind not in QUIET_KINDS:
            clock = time.strftime("%H:%M:%S")
            self.console.print(Text.assemble((f"{clock}  ", "dim"), (notice.text, STYLES[notice.severity])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to put back."""


class PlainDisplay(Display):
    """Lines for a log or a pipe: every notice, and a step now and then."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console, name)
        self._last_s = 0.0

    def on_event(self, run: Run, event: ev.Event) -> None:
        """A step, if the last one shown is long enough ago."""
        if not isinstance(event, ev.StepReport) or event is not run.last_step:
            return
        if event.at_s - self._last_s >= PLAIN_INTERVAL_S or event.step >= run.history.target_steps:
            self._last_s = event.at_s
            self.console.print(step_line(run, event))


class LiveDisplay(Display):
    """A block at the bottom of the terminal, redrawn four times a second; notices scroll by above it."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console, name)
        self._run: Run | None = None
        self._steps: deque[ev.StepReport] = deque(maxlen=RATE_STEPS)
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
        """Remember what the picture needs."""
        self._run = run
        if isinstance(event, ev.StepReport) and event is run.last_step:
            self._steps.append(event)

    async def _refresh(self) -> None:
        while True:
            if self._run is not None:
                self._live.update(self._picture(self._run), refresh=True)
            await asyncio.sleep(REFRESH_INTERVAL_S)

    def _picture(self, run: Run) -> RenderableType:
        history = run.history
        state = "restarting" if run.state is State.STARTING and history.generation > 1 else run.state.value
        title = Text.assemble((f"{self.name} ", "bold"), f"{state}, life {history.generation}", ("", ""))
        rows = Table.grid(padding=(0, 2))
        rows.add_row("progress", _bar(history.highest_step, history.target_steps), self._progress(run))
        sample = run.last_sample
        limit = run.policy.memory.limit_bytes
        used = 0 if sample is None else sample.footprint_bytes
        rows.add_row("memory", _bar(used, limit), self._memory(run, used, limit))
        step = run.last_step
        batch = "?" if step is None else f"{step.batch_size} × {step.accumulation}"
        rows.add_row(
            "batch",
            Text(batch),
            Text(f"{history.trips} trips, breaker {run.breaker.state.value}, loss {_loss(run)}"),
        )
        return Group(title, rows)

    def _progress(self, run: Run) -> Text:
        history = run.history
        seconds = sum(step.seconds for step in self._steps)
        if not self._steps or seconds <= 0:
            return Text(f"step {history.highest_step}/{history.target_steps or '?'}")
        tokens = sum(step.tokens for step in self._steps)
        unit, count = ("tokens", tokens) if tokens else ("samples", sum(step.samples for step in self._steps))
        left_s = (history.target_steps - history.highest_step) * seconds / len(self._steps)
        rate = f"{count / seconds:,.0f} {unit}/s"
        return Text(f"step {history.highest_step}/{history.target_steps}, {rate}, {left_s:.0f} s of steps left")

    def _memory(self, run: Run, used: int, limit: int) -> Text:
        leak = run.breaker.leak_bytes_per_step
        slope = "" if leak is None else f", {leak / 1e6:+.1f} MB/step"
        return Text(f"{used / MIB:,.0f} of {limit / MIB:,.0f} MiB{slope}")


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=min(done, max(total, 1)), width=30)


def _loss(run: Run) -> str:
    loss = run.history.loss
    return "?" if loss is None else f"{loss:.4f}"
