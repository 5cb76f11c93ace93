"""The TOML file as frozen, validated types. Units are in the names; sizes are bytes once parsed."""

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs

from mlx_supervisor import tables, wire
from mlx_supervisor.core.policy import MIB, BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy
from mlx_supervisor.settings_rules import check_name, check_run, resolve
from mlx_supervisor.sizes import check_smallest, share_of
from mlx_supervisor.sizes import parse_bytes as parse_bytes

FILE_LIMIT_BYTES = 1024 * 1024
RUNS_LIMIT = 64
STATE_DIR_VARIABLE = "MLX_SUPERVISOR_STATE_DIR"

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]


class TaskSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: an mlx_lm configuration file, or a Python function that builds the task."""

    kind: Literal["mlx_lm", "python"]
    config: str | None = None
    entry: str | None = None
    args: dict[str, Any] = {}


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples in memory at once, and how they may shrink and grow."""

    size: Positive | None = None
    accumulation: Positive = 1
    preserve_effective: bool = True
    minimum: Positive = 1
    start: Positive | None = None
    grow_after_steps: Positive = 200
    halve_on_leak: bool = True
    sample_log: bool = False


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits, and what becomes of MLX's cache.

    `limit`: bytes (int), a size ("18 GiB"), or a share of the machine's memory ("80%", or a float up to 1).
    `device_limit`: likewise, of the memory that a device has of its own.
    """

    limit: int | float | str = "80%"
    device_limit: int | float | str = "80%"
    policy: Literal["adaptive", "always", "never"] = "adaptive"
    confirm_samples: Positive = 2
    missing_samples: Positive = 20
    clear_first: bool = True
    gradient_checkpointing: Literal["never", "last_resort", "always"] = "last_resort"
    autopsy: bool = True
    autopsy_limit_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0
    soft_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.97
    leak_mib_per_step: Annotated[float, msgspec.Meta(gt=0, le=1_048_576)] = 0.25
    relief_wait_s: Seconds = 4.0
    sample_interval_s: Annotated[float, msgspec.Meta(ge=0.005, le=10)] = 0.05
    clear_before_gradients: bool = False
    clear_after_gradients: bool = False
    clear_after_update: bool = True
    release_pause_s: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    cache_limit: int | str | None = None


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a checkpoint is taken, and how many stay. Without an `every_…`, `overhead` decides (see `wire`)."""

    overhead: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.01
    every_steps: Whole | None = None
    every_seconds: Seconds | None = None
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    keep_best: bool = False

    @property
    def automatic(self) -> bool:
        """Whether no interval was named."""
        return self.every_steps is None and self.every_seconds is None


class RestartSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait, and when to give up."""

    max_without_progress: Positive = 3
    max_memory_without_progress: Positive = 5
    max_same_error: Positive = 2
    max_reboots: Positive = 3
    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 60.0
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    healthy_s: Seconds = 600.0
    wait_for_memory_s: Seconds = 600.0
    reboot_cooldown_s: Seconds = 60.0
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] = 600.0
    stop_grace_s: Seconds = 60.0
    term_grace_s: Seconds = 10.0
    hang_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] | None = None
    close_after_steps: Positive = 20


class DrillSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deliberate faults; see `wire.DrillJob`, which has the same fields."""

    generations: list[Positive] = []
    leak_mib_per_step: Seconds = 0.0
    leak_kind: Literal["arrays", "native"] = "arrays"
    leak_from_step: Whole = 0
    allocate_mib: Whole = 0
    allocate_at_step: Whole | None = None
    crash_at_step: Whole | None = None
    hang_at_step: Whole | None = None
    hang_kind: Literal["python", "native"] = "python"
    ignore_sigterm: bool = False
    slow_start_s: Seconds = 0.0


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    task: TaskSettings
    seed: Whole = 0
    steps: Positive | None = None
    autostart: bool = False
    stop_on_not_finite: bool = True
    deterministic: bool = False
    batch: BatchSettings = BatchSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    restart: RestartSettings = RestartSettings()
    drill: DrillSettings = DrillSettings()


@dataclass(frozen=True)
class Settings:
    """The whole file. `path` is where it was read; relative paths in it start at its folder."""

    path: Path
    state_dir: Path
    runs: dict[str, RunSettings]


class SettingsError(ValueError):
    """A settings file that cannot be used. `problems`: all that was found, a sentence each, at most 51."""

    def __init__(self, problems: list[str], path: Path | None = None) -> None:
        self.problems = problems
        self.path = path
        lines = [f"{path}: {problem}" if path else problem for problem in problems]
        super().__init__("\n".join(lines))


def read_settings(path: Path, state_dir: Path | None = None) -> Settings:
    """The settings in a TOML file.

    The state folder is `state_dir`, else the file's key `state_dir`, else the environment's MLX_SUPERVISOR_STATE_DIR,
    else the user's state folder. Raises SettingsError with every problem of the file.
    """
    path = path.expanduser().absolute()
    document = _parse(path, _read(path))
    problems = tables.Problems()
    base = path.parent
    for key, value in document.items():
        if key not in ("runs", "state_dir"):
            hint = f"did you mean [{tables.join('runs', key)}]?" if isinstance(value, dict) else ""
            problems.add(tables.join("", key), "an unknown key", "runs, state_dir", hint)
    runs = _read_runs(document.get("runs"), base, problems)
    folder = _state_dir(document.get("state_dir"), base, state_dir, problems)
    if problems.count:
        raise SettingsError(problems.listed(), path)
    return Settings(path=path, state_dir=folder, runs=runs)


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise SettingsError([f"found {what}; allowed: a TOML file"], path)
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(["found nothing; allowed: a TOML file (there is no such file)"], path) from None
    except (OSError, ValueError) as error:
        raise SettingsError([f"cannot be read: {error}"], path) from None
    if len(data) > FILE_LIMIT_BYTES:
        raise SettingsError([f"found more than {FILE_LIMIT_BYTES} bytes; allowed: at most that"], path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"line {line}: found the byte 0x{data[error.start]:02x}; allowed: UTF-8"
        raise SettingsError([found], path) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: 5,000 digits, deep nesting
        raise SettingsError([f"not TOML: {error!s:.200}"], path) from None


def _read_runs(table: object, base: Path, problems: tables.Problems) -> dict[str, RunSettings]:
    if table is None or table == {}:
        problems.add("runs", "no run", "at least one table [runs.NAME]")
        return {}
    if not tables.is_table(table):
        problems.add("runs", tables.show(table), "tables [runs.NAME]")
        return {}
    if len(table) > RUNS_LIMIT:
        problems.add("runs", f"{len(table)} runs", f"at most {RUNS_LIMIT}")
        return {}
    runs: dict[str, RunSettings] = {}
    folded: dict[str, str] = {}
    for name, run_table in table.items():
        path = tables.join("runs", name)
        check_name(name, path, folded, problems)
        run = tables.convert(run_table, RunSettings, path, problems)
        if run is not None:
            check_run(run, path, base, problems)
            runs[name] = run
    return runs


def _state_dir(value: object, base: Path, argument: Path | None, problems: tables.Problems) -> Path:
    chosen: Path | None = None
    if value is not None:
        if isinstance(value, str) and value and value.isprintable():
            chosen = resolve(value, base)
        if chosen is None:
            problems.add("state_dir", tables.show(value), "the path of a folder")
    if argument is not None:
        return argument.expanduser().absolute()
    from_environment = os.environ.get(STATE_DIR_VARIABLE)
    if chosen is None and from_environment:
        chosen = resolve(from_environment, Path.cwd())
        if chosen is None:
            problems.add(f"${STATE_DIR_VARIABLE}", tables.show(from_environment), "the path of a folder")
    return chosen or platformdirs.user_state_path("mlx-supervisor")


def limit_bytes(run: RunSettings, machine_bytes: int, where: str = "") -> int:
    """The run's memory limit in bytes on a machine with `machine_bytes` of memory.

    `where` goes before the key in the message, for example "runs.overnight". Raises SettingsError.
    """
    try:
        limit = parse_bytes(run.memory.limit, machine_bytes)
        check_smallest(limit)
        if limit > machine_bytes:
            raise ValueError(f"at most this machine's memory, {machine_bytes} bytes ({machine_bytes / 2**30:.2f} GiB)")
    except ValueError as error:
        key = tables.join_dotted(where, "memory.limit")
        raise SettingsError([f"{key}: found {tables.show(run.memory.limit)}; allowed: {error}"]) from None
    return limit


def policy_of(run: RunSettings, machine_bytes: int, where: str = "") -> RunPolicy:
    """The run's thresholds as the core wants them. Raises SettingsError when the limit does not fit the machine."""
    memory = run.memory
    batch = {name: getattr(run.batch, name) for name in BatchPolicy.__dataclass_fields__}
    restart = {name: getattr(run.restart, name) for name in RestartPolicy.__dataclass_fields__ if name != "kill_wait_s"}
    return RunPolicy(
        memory=MemoryPolicy(
            limit_bytes=limit_bytes(run, machine_bytes, where),
            confirm_samples=memory.confirm_samples,
            soft_share=memory.soft_share,
            min_slope_bytes=memory.leak_mib_per_step * MIB,
            relief_wait_s=memory.relief_wait_s,
            missing_samples=memory.missing_samples,
            clear_first=memory.clear_first,
            gradient_checkpointing=memory.gradient_checkpointing,
            autopsy=memory.autopsy,
            autopsy_limit_s=memory.autopsy_limit_s,
        ),
        batch=BatchPolicy(**batch),
        restart=RestartPolicy(**restart),
    )


def job_of(
    settings: Settings,
    name: str,
    generation: int,
    run_dir: Path,
    telemetry: str | None,
    batch_size: int | None,
    effective_batch: int | None,
    checkpoint_every_steps: int | None = None,
    mean_time_between_failures_s: float | None = None,
    memory_limit_bytes: int | None = None,
    gradient_checkpointing: bool = False,
) -> wire.Job:
    """What the worker of one generation is told. `checkpoint_every_steps` tightens the settings' interval only."""
    run = settings.runs[name]
    base = settings.path.parent
    config = resolve(run.task.config, base) if run.task.config is not None else None
    return wire.Job(
        run=name,
        generation=generation,
        run_dir=str(run_dir.absolute()),
        telemetry=telemetry,
        seed=run.seed,
        steps=run.steps,
        task=wire.TaskJob(
            kind=run.task.kind,
            base_dir=str(base),
            config=None if config is None else str(config),
            entry=run.task.entry,
            args=run.task.args,
        ),
        batch=wire.BatchJob(
            size=batch_size,
            effective=effective_batch,
            preserve_effective=run.batch.preserve_effective,
            sample_log=run.batch.sample_log,
        ),
        memory=_memory_job(run.memory, memory_limit_bytes, gradient_checkpointing),
        checkpoint=_checkpoint_job(run.checkpoint, checkpoint_every_steps, mean_time_between_failures_s),
        drill=wire.DrillJob(**msgspec.structs.asdict(run.drill)),
        grace_s=run.restart.stop_grace_s,
        hang_timeout_s=run.restart.hang_timeout_s,
        stop_on_not_finite=run.stop_on_not_finite,
        deterministic=run.deterministic,
    )


def _checkpoint_job(
    settings: CheckpointSettings, tighter_steps: int | None, mean_time_between_failures_s: float | None
) -> wire.CheckpointJob:
    job = wire.CheckpointJob(
        every_steps=settings.every_steps or 0,
        tighter_steps=tighter_steps or 0,
        every_seconds=settings.every_seconds or 0.0,
        overhead=settings.overhead if settings.automatic else 0.0,
        keep=settings.keep,
        keep_best=settings.keep_best,
    )
    if mean_time_between_failures_s is None:
        return job
    return msgspec.structs.replace(job, mean_time_between_failures_s=mean_time_between_failures_s)


def _memory_job(settings: MemorySettings, limit_bytes: int | None, gradient_checkpointing: bool) -> wire.MemoryJob:
    plain = ("policy", "clear_before_gradients", "clear_after_gradients", "clear_after_update", "release_pause_s")
    job = wire.MemoryJob(
        limit_bytes=limit_bytes,
        gradient_checkpointing=gradient_checkpointing,
        **{name: getattr(settings, name) for name in plain},
    )
    if settings.cache_limit is not None:
        job = msgspec.structs.replace(job, cache_limit_bytes=parse_bytes(settings.cache_limit, None))
    share = share_of(settings.device_limit)  # of what, only the worker knows: it has the device
    if share is not None:
        return msgspec.structs.replace(job, device_limit_share=share)
    return msgspec.structs.replace(job, device_limit_bytes=parse_bytes(settings.device_limit, None))
