"""A saver with its surroundings, for tests: a disk that blocks or fails on request, a link that records messages."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from tests.training import jobs, toy_task

from mlx_supervisor import wire
from mlx_worker.checkpoint import durable_files, training_state
from mlx_worker.checkpoint.saver import Saver
from mlx_worker.checkpoint.store import CheckpointStore
from mlx_worker.task import Task

PATIENCE_S = 30.0


class GatedFiles(durable_files.Files):
    """A disk that blocks while `gate` is closed, and fails while `error` is set."""

    def __init__(self) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        self.error = 0
        self.on_write: Callable[[], object] = lambda: None

    def write(self, descriptor: int, data: memoryview) -> int:
        self.reached.set()
        self.on_write()
        assert self.gate.wait(PATIENCE_S)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(descriptor, data)


class Bench:
    """A saver with its surroundings: the link records its messages and their threads."""

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        self.files, self.messages = GatedFiles(), list[Any]()
        self.threads: set[int] = set()
        self.memory = SimpleNamespace(has_room=lambda more_bytes: True)
        self.keep = checkpoint.pop("keep", 2)
        task = {"kind": "python", "base_dir": str(folder)}
        self.job = jobs.job(run_dir=str(folder), task=task, checkpoint=checkpoint)
        self.folder = folder
        self.saver = self.begin()

    def begin(self) -> Saver:
        """A generation, from the newest checkpoint on."""
        self.store = CheckpointStore(self.folder / "c", "run", self.keep, self.files)
        watchdog: Any = SimpleNamespace(arm=lambda floor_s=0.0: None)
        link: Any = SimpleNamespace(
            send=self._send, phase=lambda name, detail: self._send(wire.PhaseChange, phase=name, detail=detail)
        )
        memory: Any = self.memory
        return Saver(self.job, self.store, self.store.load_newest(), link, memory, watchdog)

    def _phase(self, name: str, detail: str = "") -> None:
        self._send(wire.PhaseChange, phase=name, detail=detail)

    def _send(self, kind: Any, **fields: Any) -> None:
        self.threads.add(threading.get_ident())
        self.messages.append((kind, SimpleNamespace(**fields)))

    @property
    def reports(self) -> list[Any]:
        return [fields for kind, fields in self.messages if kind is wire.Checkpoint]

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / "c").glob("step-*"))

    def save(self, step: int, *, task: Task | None = None, waiting: bool = False) -> bool:
        progress = training_state.Progress(step=step, cursor=8 * step)
        return self.saver.save(progress, 0, {"free": {"batch.size": 8}}, task or TASK, waiting=waiting)

    def until_reported(self, count: int) -> None:
        """As the loop does it: after every update."""
        deadline_s = time.monotonic() + PATIENCE_S
        while len(self.reports) < count:
            assert time.monotonic() < deadline_s
            self.saver.note_update(0.001)


TASK = toy_task.build(0)
TASK.optimizer.init(TASK.model.trainable_parameters())
mx.eval(TASK.model.state, TASK.optimizer.state)
