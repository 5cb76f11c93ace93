"""The daemon as the backend of the control interface: runs as Supervisord's processes."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mlx_supervisor.control.backend import (
    Backend,
    Channel,
    ConfigChanges,
    ConfigInfo,
    Fault,
    FaultCode,
    ProcessInfo,
    ProcessState,
    RunInfo,
)
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.core.machine.states import AT_REST, TRAINING, State
from mlx_supervisor.core.memory.device import first_to_limit
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.run import SupervisedRun
from mlx_supervisor.process.launch import worker_command
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.settings.schema import Settings, SettingsError

LIVE = frozenset(State) - AT_REST
PAUSED = frozenset({State.BACKOFF, State.WAITING})
"""Between two generations: no worker now, the next one starts automatically."""
PAUSE_S = 5.0
"""A start that waits longer (for memory, after a restart of the machine) fails with the reason."""
PROCESS_STATES = {
    State.STOPPED: ProcessState.STOPPED,
    State.STARTING: ProcessState.STARTING,
    State.BACKOFF: ProcessState.BACKOFF,
    State.WAITING: ProcessState.BACKOFF,
    State.COMPLETED: ProcessState.EXITED,
    State.FATAL: ProcessState.FATAL,
}


class DaemonBackend(Backend):
    """The daemon's runs, as the control interface drives them."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._reread: Settings | None = None

    @property
    def shutting_down(self) -> bool:
        return self._daemon.shutdown_requested.is_set()

    def processes(self) -> Sequence[ProcessInfo]:
        return [_process_info(run) for run in self._daemon.runs.values()]

    def configs(self) -> Sequence[ConfigInfo]:
        settings = self._reread or self._daemon.settings
        return [
            ConfigInfo(
                name,
                in_use=name in self._daemon.runs,
                autostart=run.autostart,
                command=" ".join(worker_command()),
                directory=str(settings.base_dir),
                stop_wait_s=run.restart.stop_grace_s,
            )
            for name, run in settings.runs.items()
        ]

    def run_info(self, name: str) -> RunInfo:
        return run_info(self._run(name))

    async def start(self, name: str, wait: bool = True) -> None:
        run = self._run(name)
        await run.until(lambda: not run.recovery.active)
        if self.shutting_down:
            raise Fault(FaultCode.SHUTDOWN_STATE, name)
        if run.machine.state in LIVE and not run.machine.stopping:
            raise Fault(FaultCode.ALREADY_STARTED, name)
        generation = run.machine.history.generation
        run.command(CommandKind.START)
        _require_durable(run, "start")
        if not wait and not run.at_rest:
            return

        def begun() -> bool:
            return run.machine.history.generation > generation or run.at_rest

        with suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_S):
                await run.until(begun)
        await run.until(lambda: begun() or run.machine.state in PAUSED)
        await run.until(lambda: run.machine.state in TRAINING | PAUSED or run.at_rest or _is_blocked(run))
        if run.machine.state is State.COMPLETED or run.machine.state in TRAINING:
            return
        spawned = run.pid is not None or run.worker.exit_status is not None
        code = FaultCode.ABNORMAL_TERMINATION if spawned else FaultCode.SPAWN_ERROR
        reason = run.machine.reason or "see the run's log"
        raise Fault(code, f"{name}: {reason}")

    async def stop(self, name: str, wait: bool = True) -> None:
        run = self._run(name)
        if run.at_rest:
            raise Fault(FaultCode.NOT_RUNNING, name)
        run.command(CommandKind.STOP, "supervisorctl")
        if wait:
            await run.until(lambda: run.at_rest)
        _require_durable(run, "stop")

    async def restart(self, name: str) -> None:
        if not self._run(name).at_rest:
            await self.stop(name)
        await self.start(name)

    def signal(self, name: str, signum: int) -> None:
        try:
            self._run(name).signal(signum)
        except ProcessLookupError:
            raise Fault(FaultCode.NOT_RUNNING, name) from None
        except OSError as error:
            raise Fault(FaultCode.FAILED, f"{name}: {error.strerror}") from None

    def log_path(self, name: str, channel: Channel) -> Path | None:
        log = self._run(name).log
        return log.stdout_path if channel == "stdout" else log.stderr_path

    def main_log_path(self) -> Path | None:
        return self._daemon.state.log

    def clear_logs(self, name: str) -> None:
        try:
            self._run(name).log.clear()
        except OSError as error:
            raise Fault(FaultCode.FAILED, f"{name}: {error.strerror}") from None

    def clear_main_log(self) -> None:
        path = self._daemon.state.log
        if not path.exists():
            raise Fault(FaultCode.NO_FILE, str(path))
        try:
            path.open("w").close()
        except OSError as error:
            raise Fault(FaultCode.FAILED, f"{path}: {error.strerror}") from None

    def shutdown(self, restart: bool = False) -> None:
        self._daemon.restart_requested = restart
        self._daemon.shutdown_requested.set()

    def reload_config(self) -> ConfigChanges:
        now = self._daemon.settings
        try:
            self._reread = read_settings(now.path, now.state_dir)
        except SettingsError as error:
            raise Fault(FaultCode.CANT_REREAD, str(error)) from None
        runs, used = self._reread.runs, self._daemon.runs
        return ConfigChanges(
            added=[name for name in runs if name not in used],
            changed=[name for name in runs if name in used and used[name].settings.runs[name] != runs[name]],
            removed=[name for name in used if name not in runs],
        )

    async def add(self, name: str) -> None:
        settings = self._reread or self._daemon.settings
        if name in self._daemon.runs:
            raise Fault(FaultCode.ALREADY_ADDED, name)
        if name not in settings.runs:
            raise Fault(FaultCode.BAD_NAME, name)
        self._daemon.settings = settings
        try:
            run = await self._daemon.take_up(name)
        except Exception as error:
            raise Fault(FaultCode.FAILED, f"{name}: {error}") from error
        if settings.runs[name].autostart and not self.shutting_down:
            run.command(CommandKind.START, "autostart")
            _require_durable(run, "start")

    async def remove(self, name: str) -> None:
        run = self._run(name)
        if run.recovery.active or not run.at_rest:
            raise Fault(FaultCode.STILL_RUNNING, name)
        await self._daemon.remove(name)

    def _run(self, name: str) -> SupervisedRun:
        run = self._daemon.runs.get(name)
        if run is None:
            raise Fault(FaultCode.BAD_NAME, name)
        return run


def _require_durable(run: SupervisedRun, what: str) -> None:
    """Nothing is acknowledged that a supervisor killed now would forget. Raises Fault FAILED."""
    if run.unsaved:
        text = f"{run.name}: the {what} is under way, but a supervisor that dies now would forget it"
        raise Fault(FaultCode.FAILED, f"{text}: {run.unsaved}")


def _is_blocked(run: SupervisedRun) -> bool:
    """Whether the start waits for a process that only a person can end; `reason` names it."""
    return bool(run.machine.blocked and run.machine.reason)


def run_info(run: SupervisedRun) -> RunInfo:
    """Progress and memory of a run."""
    machine = run.machine
    history, step, sample = machine.history, machine.last_step, machine.last_sample
    device, growth = machine.device, first_to_limit(machine.device, machine.breaker.growth)
    info = RunInfo(
        generation=history.generation,
        step=history.highest_step if step is None else step.step,
        target_steps=history.target_steps,
        loss=history.loss,
        validation_loss=history.validation_loss,
        validation_step=None if history.validation_loss is None else history.validation_step,
        best_validation_loss=history.best_validation_loss,
        best_validation_step=None if history.best_validation_loss is None else history.best_validation_step,
        smoothed_loss=history.smoothed_loss,
        activity=machine.activity,
        metrics=history.metrics,
        validation_metrics=history.validation_metrics,
        batch_size=machine.batch.size,
        effective_batch=machine.batch.effective,
        limit_bytes=machine.policy.memory.limit_bytes,
        leak="leaking" if growth.verdict else "",
        leak_bytes_per_step=growth.bytes_per_step,
        leak_by_cause_bytes_per_step=dict(growth.by_cause),
        steps_to_limit=growth.steps_left,
        seconds_to_limit=growth.seconds_left,
        breaker=machine.breaker.state.value,
        trips=history.trips,
        restarts=history.restarts,
        checkpoint_step=history.durable_step,
        outcome=history.outcome,
        reason=machine.reason,
        phase=machine.state.value,
        gradient_checkpointing=machine.checkpoints_gradients,
        error=history.error,
        waiting_for=machine.waiting_for,
        autopsy=list(history.autopsy),
    )
    if device.limit_bytes:
        info["device_used_bytes"], info["device_limit_bytes"] = device.used_bytes, device.limit_bytes
        info["device_total_bytes"], info["device_others_bytes"] = device.total_bytes or None, device.others_bytes
    if sample is not None:
        info["footprint_bytes"] = sample.footprint_bytes
    if step is not None:
        info["accumulation"] = step.accumulation
        info["active_bytes"], info["cache_bytes"] = step.active_bytes, step.cache_bytes
    speed = machine.rate.speed(history.target_steps)
    if speed is not None and machine.state in TRAINING:
        info["tokens_per_s"] = speed.per_s if speed.unit == "tokens" else 0.0
        info["eta_s"] = speed.left_s
    return info


def _process_info(run: SupervisedRun) -> ProcessInfo:
    """A worker that is restarted counts as RUNNING: the operator has nothing to do."""
    state = run.machine.state
    refused = run.machine.history.refused
    if refused and run.machine.history.outcome == "completed":
        state = State.COMPLETED  # as a later daemon finds it
    return ProcessInfo(
        name=run.name,
        state=PROCESS_STATES.get(state, ProcessState.STOPPING if run.machine.stopping else ProcessState.RUNNING),
        pid=run.pid or 0,
        started_at_s=run.worker.started_wall_s,
        stopped_at_s=run.worker.stopped_wall_s,
        exit_status=run.worker.exit_status,
        detail=run.machine.reason if state in PAUSED | {State.FATAL} else refused and f"last start refused: {refused}",
    )
