"""The history of a run: it survives the worker and the supervisor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from types import GenericAlias, NoneType, UnionType
from typing import Any

from mlx_supervisor.core.events import Recovered, StepReport

SHORTEST_TIMED_S = 1.0
"""Reports of updates in less time may arrive together, and say nothing about the speed."""
LOSS_BETA = 0.98
"""Of the smoothed loss: an exponential mean over about the last 50 updates."""
DEFAULT_MTBF_S = 4 * 3600.0
"""Mean time between failures of a run without any: a cautious guess."""

_RENAMED = {
    "asked_size": "requested_size", "asked_effective": "requested_effective",
    "barren_lives": "without_progress", "barren_memory_lives": "memory_without_progress", "wanted": "unfinished",
    "life_steps": "generation_steps", "life_train_s": "generation_train_s", "life_active_s": "generation_active_s",
}  # fmt: skip
"""Keys in the journals of older versions, and their names today."""


@dataclass(slots=True)
class RunHistory:
    """Counters over all generations of one run. Steps are optimizer updates, times in seconds.

    `least_size`: the smallest micro-batch since the last progress. `unfinished`: the next supervisor resumes the run.
    `completed_digest`: of what the run was trained with when it last completed; "" if that is unknown.
    `settings_file`: the run's; with the run's name, it is the run's identity. "" in the journals of older versions.
    `loss_sum`, `loss_weight`: of the smoothed loss. `timed_tokens`: tokens of the updates after the first of each
    generation; `timed_s`: wall time from the first to the last update of each. `best_validation_…`: the lowest so far.
    `proven_limit_bytes`: the lowest limit under which the run made an update, 0 before any. `starts`: starts that
    a person requested, or autostart of a run that was not interrupted; every other generation is a restart.
    `growth_…`: micro-batch, effective batch and bytes per update of the latest death with steady growth. `leak_kept`:
    that micro-batch stays, because a smaller one did not slow the leak.
    `external_s`: when other processes ended the worker within the last hour, without a new checkpoint.
    `stop_requested`: the reason of an acknowledged stop, until the generation has ended; a later supervisor does
    not resume the run.
    `refused`: why the latest start failed before its first update, of a run that had made some; its outcome stays.
    `error`: the latest, "" once a later generation is ready.
    `generation_…`: the current generation's share of the totals, needed if the supervisor dies and must add the rest.
    """

    generation: int = 0
    settings_file: str = ""
    batch_size: int | None = None
    requested_size: int | None = None
    requested_effective: int | None = None
    tripped_sizes: list[int] = field(default_factory=list)
    leak_from: int | None = None
    growth_size: int | None = None
    growth_effective: int | None = None
    growth_bytes: float = 0.0
    leak_kept: bool = False
    least_size: int | None = None
    gradient_checkpointing: bool = False
    can_checkpoint_gradients: bool = False
    without_progress: int = 0
    memory_without_progress: int = 0
    waits: int = 0
    external_s: list[float] = field(default_factory=list)
    external_without_progress: int = 0
    reboots: int = 0
    cooling: bool = False
    last_error: str = ""
    last_error_step: int = 0
    same_errors: int = 0
    trips: int = 0
    highest_step: int = 0
    durable_step: int = 0
    target_steps: int = 0
    replayed_steps: int = 0
    useful_s: float = 0.0
    train_s: float = 0.0
    stall_s: float = 0.0
    active_s: float = 0.0
    generation_steps: int = 0
    generation_train_s: float = 0.0
    generation_active_s: float = 0.0
    loss: float | None = None
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    timed_tokens: int = 0
    timed_s: float = 0.0
    validation_loss: float | None = None
    validation_step: int = 0
    best_validation_loss: float | None = None
    best_validation_step: int = 0
    test_loss: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    validation_metrics: dict[str, float | None] = field(default_factory=dict)
    weights_sha256: str | None = None
    exported_to: str = ""
    durable_before: int = 0
    tighter_steps: int | None = None
    limit_bytes: int = 0
    proven_limit_bytes: int = 0
    failures: int = 0
    starts: int = 0
    breaker_open: bool = False
    autopsy: list[str] = field(default_factory=list)
    error: str = ""
    unfinished: bool = False
    stop_requested: str = ""
    completed_digest: str = ""
    outcome: str = ""
    reason: str = ""
    refused: str = ""

    def add_step(self, report: StepReport, previous: StepReport | None = None) -> None:
        """Count one update: a new one, or a replay after a restart. `previous`: the report before it, if any."""
        if previous is not None and report.step > previous.step:
            self.timed_tokens += report.tokens
            self.timed_s += max(report.at_s - previous.at_s, 0.0)
        self.train_s += report.seconds
        self.generation_steps += 1
        self.generation_train_s += report.seconds
        self.loss = self.loss if report.loss is None else report.loss
        self.proven_limit_bytes = min(self.proven_limit_bytes or self.limit_bytes, self.limit_bytes)
        self.metrics = dict(report.metrics)
        if report.step <= self.highest_step:
            self.replayed_steps += 1
        else:
            self.highest_step = report.step
            self.test_loss = None  # that of the model before
            self.useful_s += report.seconds
            if report.loss is not None and isfinite(report.loss):
                self.loss_sum = LOSS_BETA * self.loss_sum + (1 - LOSS_BETA) * report.loss
                self.loss_weight = LOSS_BETA * self.loss_weight + (1 - LOSS_BETA)

    def add_validation(self, step: int, loss: float) -> None:
        """A validation; after a restart it may be one of an earlier step again."""
        self.validation_loss, self.validation_step = loss, step
        best = self.best_validation_loss
        if isfinite(loss) and (best is None or loss < best):
            self.best_validation_loss, self.best_validation_step = loss, step

    def forget_trips_below(self, limit_bytes: int) -> None:
        """Under a higher limit, sizes that tripped under a lower one may be tried again."""
        if limit_bytes > self.limit_bytes:
            self.tripped_sizes = []
            self.gradient_checkpointing = False
        self.limit_bytes = limit_bytes

    def proven(self, limit_bytes: int) -> bool:
        """Whether the run made a step under this limit or a lower one."""
        proven_bytes = self.proven_limit_bytes or (self.limit_bytes if self.highest_step else 0)  # an older journal
        return 0 < proven_bytes <= limit_bytes

    def add_active(self, seconds: float) -> None:
        """Time during which the run was not at rest."""
        self.active_s += seconds
        self.generation_active_s += seconds

    def begin_generation(self) -> None:
        """Nothing of the new generation is counted yet."""
        self.generation_steps, self.generation_train_s, self.generation_active_s = 0, 0.0, 0.0

    def add_lost_generation(self, lost: Recovered) -> None:
        """Count the part of the latest generation that a dead supervisor saw but did not save."""
        self.active_s += max(lost.uptime_s - self.generation_active_s, 0.0)
        self.generation_active_s = max(lost.uptime_s, self.generation_active_s)
        if lost.last_step == 0:
            return
        steps = lost.last_step - lost.first_step + 1 - self.generation_steps
        if steps <= 0:
            return
        train_s = max(lost.train_s - self.generation_train_s, 0.0)
        new_steps = max(min(lost.last_step - self.highest_step, steps), 0)
        self.train_s += train_s
        self.useful_s += train_s * new_steps / steps
        self.replayed_steps += steps - new_steps
        self.highest_step = max(self.highest_step, lost.last_step)
        self.generation_steps += steps
        self.generation_train_s += train_s

    def add_unheard(self, first_step: int, last_step: int) -> None:
        """Count the updates of the current generation, `first_step` to `last_step`, that were not reported.

        Their durations are unknown.
        """
        steps = last_step - first_step + 1 - self.generation_steps
        if steps > 0:
            new_steps = max(min(last_step - self.highest_step, steps), 0)
            self.replayed_steps += steps - new_steps
            self.generation_steps += steps
        self.highest_step = max(self.highest_step, last_step)

    @property
    def smoothed_loss(self) -> float | None:
        """Exponential mean of the updates' losses, replays left out, corrected for its start; None before any."""
        return self.loss_sum / self.loss_weight if self.loss_weight > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Average over wall time between updates, with evaluations and checkpoints, without loading and restarts.

        None without tokens, or with less than a second of updates.
        """
        return self.timed_tokens / self.timed_s if self.timed_s >= SHORTEST_TIMED_S and self.timed_tokens else None

    @property
    def restarts(self) -> int:
        """Generations that the supervisor started, not a person."""
        return max(self.generation - max(self.starts, 1), 0)

    @property
    def goodput(self) -> float | None:
        """Share of the active time spent in steps that were not replayed; None before any time has passed."""
        return min(self.useful_s / self.active_s, 1.0) if self.active_s > 0 else None

    @property
    def checkpoint_stall_fraction(self) -> float | None:
        """Time that checkpoints stalled training, as a share of both together; None before any step."""
        return self.stall_s / (self.train_s + self.stall_s) if self.train_s > 0 else None

    @property
    def mean_time_between_failures_s(self) -> float:
        """Active time per failure; before the first failure, at least the default."""
        if self.failures == 0:
            return max(self.active_s, DEFAULT_MTBF_S)
        return self.active_s / self.failures

    def snapshot(self) -> dict[str, Any]:
        """Plain values for the journal. A loss that is not finite becomes None: JSON has no such number."""
        values = asdict(self)
        for name in ("loss", "validation_loss"):
            if values[name] is not None and not isfinite(values[name]):
                values[name] = None
        return values

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> "RunHistory":
        """From a snapshot. Unknown keys, of other versions, are ignored. Raises ValueError for a wrong type."""
        snapshot = {_RENAMED.get(key, key): value for key, value in snapshot.items()}
        history = cls()
        for each in fields(cls):
            if each.name not in snapshot:
                continue
            value = snapshot[each.name]
            if not _fits(value, each.type):
                raise ValueError(f"history: {each.name} is {value!r:.80}, expected {each.type}")
            setattr(history, each.name, list(value) if isinstance(value, list | tuple) else value)
        return history


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in kind.__args__)
    if kind is NoneType:
        return value is None
    if isinstance(kind, GenericAlias) and kind.__origin__ is dict:
        key, item = kind.__args__
        return isinstance(value, dict) and all(_fits(a, key) and _fits(b, item) for a, b in value.items())
    if isinstance(kind, GenericAlias):
        return isinstance(value, list | tuple) and all(_fits(each, kind.__args__[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)  # type: ignore[arg-type]


@dataclass(slots=True)
class Generation:
    """The record of one generation.

    `loading`: the worker reported that it loads, and nothing later. `held_bytes`: its footprint once loaded, else 0.
    """

    generation: int
    started_s: float
    batch_size: int | None = None
    accumulation: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    peak_footprint_bytes: int = 0
    peak_device_bytes: int = 0
    durable_before: int = 0
    pid: int | None = None
    gradient_checkpointing: bool = False
    ready_step: int = 0
    loading: bool = False
    held_bytes: int = 0
    error: str = ""
    autopsy: list[str] = field(default_factory=list)

    @classmethod
    def recovered(cls, lost: Recovered, batch_size: int | None, gradient_checkpointing: bool) -> "Generation":
        """A generation whose supervisor died, as far as the journal has it."""
        return cls(
            lost.generation,
            lost.at_s - lost.uptime_s,
            batch_size=lost.batch_size or batch_size,
            accumulation=lost.accumulation,
            first_step=lost.first_step or None,
            last_step=lost.last_step or None,
            peak_footprint_bytes=lost.peak_footprint_bytes,
            gradient_checkpointing=gradient_checkpointing,
        )

    def add_step(self, report: StepReport) -> None:
        """Record the update; the batch is that of the latest one."""
        if self.first_step is None:
            self.first_step = report.step
        self.last_step = report.step
        self.batch_size = report.batch_size
        self.accumulation = report.accumulation

    def record(self, at_s: float, ended: str, cause: str) -> dict[str, Any]:
        """The values for journal and summary; `ended`: the exit, `cause`: the cause of the death."""
        return {
            "generation": self.generation,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "seconds": round(at_s - self.started_s, 3),
            "peak_footprint_mib": round(self.peak_footprint_bytes / 2**20, 1),
            "peak_device_mib": round(self.peak_device_bytes / 2**20, 1),
            "ended": ended,
            "cause": cause,
            "error": self.error,
            "gradient_checkpointing": self.gradient_checkpointing,
            "autopsy": list(self.autopsy),
        }
