"""What a run in the foreground shows: a live display on a terminal, plain lines elsewhere."""

import asyncio
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import TRAINS, Run
from mlx_supervisor.core.machine.states import AT_REST, TRAINING
from mlx_supervisor.core.memory.breaker import BreakerState
from mlx_supervisor.core.memory.device import first_to_limit
from mlx_supervisor.core.memory.growth import Growth
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import counted, duration, figures, growth_rate, loss_text, mebibytes, validation_text
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.daemon.step_line import step_line
from mlx_supervisor.host.time_left import time_left

PLAIN_INTERVAL_S = 2.0
REFRESH_INTERVAL_S = 0.25
QUIET_ACTIVITY_S = 5.0
"""A phase other than training that lasts longer gets a line; the next after twice the time, at the latest a minute."""
LABEL_WIDTH = 12
LEAST_BAR_WIDTH = 8
STYLES = {act.Severity.INFO: "", act.Severity.WARNING: "yellow", act.Severity.ERROR: "bold red"}


class Display(Observer, AbstractContextManager["Display"]):
    """Shows one run while the context lasts."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name

    def on_notice(self, notice: act.Notice) -> None:
        """Print every notice but the quiet ones."""
        if not notice.quiet:
            clock = time.strftime("%H:%M:%S")
            self.console.print(Text.assemble((f"{clock}  ", "dim"), (notice.text, STYLES[notice.severity])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Plain lines hold nothing open."""


class PlainDisplay(Display):
    """Lines for a log or a pipe: every notice, a step every `PLAIN_INTERVAL_S`, and every long phase between steps."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(console, name)
        self._last_s = 0.0
        self._left_out: set[str] = set()
        self._activity_since_s = 0.0
        self._activity_due_s = QUIET_ACTIVITY_S

    def on_event(self, run: Run, event: ev.Event) -> None:
        """Print a step when the interval since the last one is over, and the final step always."""
        self._show_activity(run, event.at_s)
        if not isinstance(event, ev.StepReport) or event is not run.last_step:
            return
        if event.at_s - self._last_s >= PLAIN_INTERVAL_S or event.step >= run.history.target_steps:
            self._last_s = event.at_s
            self.console.print(step_line(run, event, self._left_out))

    def _show_activity(self, run: Run, at_s: float) -> None:
        """`Loading the model … 10 s`. The samples of a worker, or of the machine, are the clock."""
        if run.activity_since_s != self._activity_since_s:
            self._activity_since_s, self._activity_due_s = run.activity_since_s, QUIET_ACTIVITY_S
        lasted_s = at_s - run.activity_since_s
        if run.activity != TRAINS and run.state not in AT_REST and lasted_s >= self._activity_due_s:
            self._activity_due_s = min(2 * self._activity_due_s, self._activity_due_s + 60.0)
            text = f"{time.strftime('%H:%M:%S')}  {run.activity.capitalize()} … {duration(float(int(lasted_s)))}"
            self.console.print(text)


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
            if self._run is not None and self._run.state not in AT_REST:
                self._live.update(self._block(self._run), refresh=True)
            await asyncio.sleep(REFRESH_INTERVAL_S)

    def _block(self, run: Run) -> Group:
        return Group(*block(self.name, run, time.monotonic(), self.console.width))


def block(name: str, run: Run, now_s: float, width: int) -> list[Text]:
    """The live display's lines. None is wider than `width`: a line that wraps leaves traces on the terminal."""
    history, sample = run.history, run.last_sample
    used, limit = (0 if sample is None else sample.footprint_bytes), run.policy.memory.limit_bytes
    progress, memory, device = progress_text(run), memory_text(used, limit), device_text(run)
    room = width - LABEL_WIDTH - max(len(progress), len(memory), len(device)) - 3
    bar = room if room >= LEAST_BAR_WIDTH else 0
    further = {
        "growth": growth_text(first_to_limit(run.device, run.breaker.growth)),
        "loss": losses_of(run),
        "validation": validation_of(run),
        "metrics": ", ".join(figures(history.metrics)),
        "batch": batch_text(run),
        "waiting": f"for {run.waiting_for}" if run.waiting_for else "",
    }
    rows = [
        Text.assemble((f"{name}  ", "bold"), doing_text(run, now_s)),
        _row("progress", progress, _bar(bar, history.highest_step, history.target_steps)),
        _row("memory", memory, _bar(bar, used, limit)),
        *([_row("device", device, _bar(bar, run.device.used_bytes, run.device.limit_bytes))] if device else []),
        *(_row(label, text) for label, text in further.items() if text),
    ]
    for row in rows:
        row.truncate(max(width - 1, 1), overflow="ellipsis")
    return rows


def _row(label: str, text: str, bar: Text | None = None) -> Text:
    head = Text.assemble((f"{label:<{LABEL_WIDTH}}", "dim"))
    return Text.assemble(head, bar, "  ", text) if bar else Text.assemble(head, text)


def _bar(width: int, done: float, total: float) -> Text | None:
    if not width:
        return None
    filled = round(width * min(done / max(total, 1), 1.0))
    return Text.assemble(("━" * filled, "green"), ("─" * (width - filled), "dim"))


def doing_text(run: Run, now_s: float) -> str:
    """What the run does, for how long unless it trains, and its restarts."""
    lasted_s = now_s - run.activity_since_s
    doing = run.activity
    if doing != TRAINS and run.activity_since_s and lasted_s >= 1:
        doing += f" … {duration(float(int(lasted_s)))}"
    restarts = counted(run.history.restarts, "restart") if run.history.restarts else ""
    return ", ".join(filter(None, (doing, restarts)))


def progress_text(run: Run) -> str:
    """The step; while the worker trains also its speed and the time left, as far as known."""
    history = run.history
    parts = [f"step {history.highest_step}/{history.target_steps or '?'}"]
    speed = run.rate.speed(history.target_steps)
    if speed is not None and run.state in TRAINING:
        parts += [f"{speed.per_s:,.0f} {speed.unit}/s", time_left(speed.left_s)]
    return ", ".join(filter(None, parts))


def memory_text(used_bytes: int, limit_bytes: int) -> str:
    """Footprint and limit."""
    used, limit = mebibytes(used_bytes, limit_bytes)
    return f"{used} of {limit} MiB"


def device_text(run: Run) -> str:
    """`12,345 of 24,576 MiB, others 2,048`, of a device with its own memory; else ""."""
    device = run.device
    if not device.limit_bytes:
        return ""
    others = "" if not device.others_bytes else f", others {mebibytes(device.others_bytes)[0]}"
    return memory_text(device.used_bytes, device.limit_bytes) + others


def growth_text(growth: Growth) -> str:
    """As far as known: growth per step, its causes, and when it reaches the limit."""
    parts = []
    slope = growth.bytes_per_step
    if slope is not None and slope > 0:
        causes = [f"{cause} {part / MIB:.1f}" for cause, part in growth.by_cause.items() if part > 0]
        shares = f" ({', '.join(causes)})" if causes else ""
        parts.append(f"{'leak' if growth.verdict else 'growth'} {growth_rate(slope)}{shares}")
    if growth.steps_left is not None and growth.seconds_left is not None:
        parts.append(f"limit in {counted(round(growth.steps_left), 'step')} ({duration(growth.seconds_left)})")
    return ", ".join(parts)


def batch_text(run: Run) -> str:
    """`4 × 2`, what becomes of it, then trips and a breaker that is not closed; "" while nothing is known."""
    step, history = run.last_step, run.history
    if step is None:
        size, effective = run.batch.size, run.batch.effective
        accumulation = None if size is None or effective is None else -(-effective // size)
    else:
        size, accumulation = step.batch_size, step.accumulation
    parts = ["" if size is None or accumulation is None else f"{size} × {accumulation}", growth_due_text(run, size)]
    if run.checkpoints_gradients:
        parts.append("gradient checkpointing")
    if history.trips:
        parts.append(counted(history.trips, "memory trip"))
    if run.breaker.state is not BreakerState.CLOSED:
        parts.append(f"breaker {run.breaker.state.value}")
    return ", ".join(filter(None, parts))


def growth_due_text(run: Run, size: int | None) -> str:
    """What becomes of a micro-batch of `size` that is smaller than requested; "" for any other."""
    batch = run.batch
    if size is None or batch.size is None or batch.requested is None or max(size, batch.size) > batch.requested:
        return ""
    if batch.size > size:
        return f"growing to {batch.size}"
    if batch.growth_due is not None:
        larger, steps = batch.growth_due
        when = "once stable" if run.breaker.state is not BreakerState.CLOSED else f"after {counted(steps, 'good step')}"
        return f"grows to {larger} {when}"
    return f"stays below {min(batch.tripped)}, which did not fit" if batch.tripped and size < batch.requested else ""


def losses_of(run: Run) -> str:
    """`2.976, smoothed 3.01`."""
    loss, smoothed = run.history.loss, run.history.smoothed_loss
    parts = ["" if loss is None else loss_text(loss), "" if smoothed is None else f"smoothed {loss_text(smoothed)}"]
    return ", ".join(filter(None, parts))


def validation_of(run: Run) -> str:
    """`2.31 at step 40 (best 2.28 at step 30)`, or ""."""
    past = run.history
    if past.validation_loss is None:
        return ""
    return validation_text(
        past.validation_loss, past.validation_step, past.best_validation_loss, past.best_validation_step
    )
