"""What a run has lived through: it outlives the worker and the supervisor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

from mlx_supervisor.core.events import StepReport


@dataclass(slots=True)
class RunHistory:
    """Counters over all lives of one run. Steps are optimizer updates, times in seconds."""

    generation: int = 0
    batch_size: int | None = None
    asked_size: int | None = None
    asked_effective: int | None = None
    tripped_sizes: list[int] = field(default_factory=list)
    barren_lives: int = 0
    trips: int = 0
    highest_step: int = 0
    durable_step: int = 0
    target_steps: int = 0
    replayed_steps: int = 0
    useful_s: float = 0.0
    train_s: float = 0.0
    stall_s: float = 0.0
    active_s: float = 0.0
    loss: float | None = None
    weights_sha256: str | None = None
    breaker_open: bool = False
    wanted: bool = False
    outcome: str = ""
    reason: str = ""

    def add_step(self, report: StepReport) -> None:
        """Count one update: new, or done again after a restart."""
        self.train_s += report.seconds
        self.loss = report.loss
        if report.step <= self.highest_step:
            self.replayed_steps += 1
        else:
            self.highest_step = report.step
            self.useful_s += report.seconds

    @property
    def goodput(self) -> float | None:
        """Share of the run's time that went into steps that counted; None before any time has passed."""
        return min(self.useful_s / self.active_s, 1.0) if self.active_s > 0 else None

    @property
    def checkpoint_stall_fraction(self) -> float | None:
        """Time that training stood still for checkpoints, over training time; None before any step."""
        return self.stall_s / (self.train_s + self.stall_s) if self.train_s > 0 else None

    def snapshot(self) -> dict[str, Any]:
        """As plain values for the journal. A loss that JSON can't hold is left out."""
        values = asdict(self)
        if self.loss is not None and not isfinite(self.loss):
            values["loss"] = None
        return values

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> "RunHistory":
        """From a snapshot. Keys of other versions are passed over; a wrong type is a ValueError."""
        history = cls()
        for each in fields(cls):
            if each.name not in snapshot:
                continue
            value, default = snapshot[each.name], getattr(history, each.name)
            expected = (float, int) if isinstance(default, float) else type(default)
            if default is not None and not isinstance(value, expected):
                raise ValueError(f"history: {each.name} is {value!r}, expected {type(default).__name__}")
            setattr(history, each.name, value)
        return history


@dataclass(slots=True)
class Life:
    """One generation of the worker, for the summary."""

    generation: int
    started_s: float
    batch_size: int | None = None
    accumulation: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    peak_footprint_bytes: int = 0
    durable_before: int = 0
    pid: int | None = None

    def add_step(self, report: StepReport) -> None:
        """Note the update; the batch is that of the latest one."""
        if self.first_step is None:
            self.first_step = report.step
        self.last_step = report.step
        self.batch_size = report.batch_size
        self.accumulation = report.accumulation

    def record(self, at_s: float, ended: str, cause: str) -> dict[str, Any]:
        """As the summary has it."""
        return {
            "generation": self.generation,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "seconds": round(at_s - self.started_s, 3),
            "peak_footprint_mib": round(self.peak_footprint_bytes / 2**20, 1),
            "ended": ended,
            "cause": cause,
        }
