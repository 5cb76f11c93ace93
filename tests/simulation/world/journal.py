"""The journal as the daemon uses it: what is durable when, and what survives a supervisor crash."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_supervisor.core import events as ev

ROWS_UNCOMMITTED = 3
"""Steps in the journal not yet committed: a crash loses up to this many."""


@dataclass
class OpenGeneration:
    """A generation without a recorded end."""

    generation: int
    boot: int
    opened_s: float
    batch_size: int | None
    last_s: float = 0.0
    peak_bytes: int = 0
    first_step: int = 0
    last_step: int = 0
    accumulation: int | None = None
    train_s: float = 0.0
    fresh: deque[ev.StepReport] = field(default_factory=deque)

    def note(self, step: ev.StepReport) -> None:
        """Add a step's row: committed after a few more."""
        self.fresh.append(step)
        if len(self.fresh) > ROWS_UNCOMMITTED:
            self._commit(self.fresh.popleft())

    def lose(self, kept: int) -> None:
        """The supervisor died: only `kept` of the pending rows were written."""
        for step in list(self.fresh)[:kept]:
            self._commit(step)
        self.fresh.clear()

    def _commit(self, step: ev.StepReport) -> None:
        self.first_step = self.first_step or step.step
        self.last_step, self.last_s = step.step, step.at_s
        self.batch_size, self.accumulation = step.batch_size, step.accumulation
        self.train_s += step.seconds

    def recovered(self, now_s: float, boot: int) -> ev.Recovered:
        """The recovery event of the next supervisor."""
        return ev.Recovered(
            now_s,
            self.generation,
            self.boot != boot,
            self.first_step,
            self.last_step,
            self.batch_size,
            self.accumulation,
            self.train_s,
            max(self.last_s - self.opened_s, 0.0),
            self.peak_bytes,
        )


class SimulatedJournal:
    """What is durable, and what is pending.

    `newest`: the highest generation opened. `shadow` is saved with each history: the checks expect that much of the
    next machine.
    """

    def __init__(self) -> None:
        self.history: str | None = None
        self.shadow: object = None
        self.newest = 0
        self.generations: dict[int, OpenGeneration] = {}
        self._number = 0
        self._pending: tuple[int, str, object] | None = None

    def save(self, snapshot: Mapping[str, Any], shadow: object) -> None:
        """Durable on return."""
        self._number += 1
        self.history, self.shadow = json.dumps(snapshot), shadow

    def save_later(self, snapshot: Mapping[str, Any], shadow: object) -> bool:
        """Write in a thread, unless a write is pending. Returns whether this one is pending now."""
        self._number += 1
        if self._pending is not None:
            return False
        self._pending = (self._number, json.dumps(snapshot), shadow)
        return True

    def commit(self) -> None:
        """The thread writes, unless something newer was saved."""
        if self._pending is not None and self._pending[0] == self._number:
            _, self.history, self.shadow = self._pending
        self._pending = None

    def lose(self, written: bool, kept_rows: int) -> None:
        """The supervisor died: the pending history was `written`, or not."""
        if written:
            self.commit()
        self._pending = None
        for left in self.open():
            left.lose(kept_rows)

    def begin(self, generation: int, boot: int, now_s: float, batch_size: int | None) -> None:
        """Open a generation, before its worker exists."""
        self.newest = max(self.newest, generation)
        self.generations[generation] = OpenGeneration(generation, boot, now_s, batch_size, last_s=now_s)

    def close(self, generation: int) -> None:
        """Record the end of a generation."""
        self.generations.pop(generation, None)

    def open(self) -> list[OpenGeneration]:
        """Generations without a recorded end."""
        return list(self.generations.values())
