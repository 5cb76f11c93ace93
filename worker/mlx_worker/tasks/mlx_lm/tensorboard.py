"""Reports as TensorBoard's event files, written by the package tensorboardX, else by tensorboard itself."""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("tensorboardX", "tensorboard")


def is_installed() -> bool:
    """Whether one of the packages is installed; none is imported."""
    return any(importlib.util.find_spec(name) is not None for name in PACKAGES)


class TensorBoard:
    """One curve in `folder` for all generations of a run: what a restart repeats replaces what was there.

    `start(iteration)` comes first. Every report is written and flushed at once: a killed worker loses none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._write: Callable[[Any], None] | None = None

    def start(self, iteration: int) -> None:
        """Begin a file. It hides the reports from `iteration` on that an earlier generation wrote."""
        package = next(name for name in PACKAGES if importlib.util.find_spec(name) is not None)
        proto = f"{package}.proto" if package == PACKAGES[0] else f"{package}.compat.proto"
        self._events: Any = importlib.import_module(f"{proto}.event_pb2")
        self._summaries: Any = importlib.import_module(f"{proto}.summary_pb2")
        self._write = (_tensorboardx if package == PACKAGES[0] else _tensorboard)(self._folder)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(iteration, session_log=start)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """As mlx_lm calls it."""
        self._report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """As mlx_lm calls it."""
        self._report(val_info)

    def _report(self, info: dict[str, Any]) -> None:
        kind = self._summaries.Summary
        named = [(name, float(value)) for name, value in info.items() if name != "iteration"]
        self._add(
            info["iteration"], summary=kind(value=[kind.Value(tag=tag, simple_value=each) for tag, each in named])
        )

    def _add(self, iteration: int, **content: Any) -> None:
        assert self._write is not None, "start comes first"
        self._write(self._events.Event(wall_time=time.time(), step=iteration, **content))


def _tensorboardx(folder: Path) -> Callable[[Any], None]:
    """Its file without its thread: `SummaryWriter.flush` leaves reports in a queue, which a killed worker loses."""
    folder.mkdir(parents=True, exist_ok=True)
    module: Any = importlib.import_module("tensorboardX.event_file_writer")
    writer = module.EventsWriter(str(folder / "events"), f".{os.getpid()}")

    def write(event: Any) -> None:
        writer.write_event(event)
        writer.flush()

    return write


def _tensorboard(folder: Path) -> Callable[[Any], None]:
    module: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    writer = module.EventFileWriter(str(folder))

    def write(event: Any) -> None:
        writer.add_event(event)
        writer.flush()

    return write
