"""Policies with the settings' defaults, and changes to them."""

from dataclasses import replace
from typing import Any

from mlx_supervisor.core.policy import BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy
from mlx_supervisor.settings.schema import RunSettings, TaskSettings
from mlx_supervisor.settings.to_policy import policy_of

DEFAULTS = policy_of(RunSettings(task=TaskSettings(kind="python")), 2**40)


def memory_policy(limit_bytes: int, **changes: Any) -> MemoryPolicy:
    return replace(DEFAULTS.memory, limit_bytes=limit_bytes, **changes)


def batch_policy(size: int | None = None, **changes: Any) -> BatchPolicy:
    return replace(DEFAULTS.batch, size=size, **changes)


def restart_policy(**changes: Any) -> RestartPolicy:
    return replace(DEFAULTS.restart, **changes)


def run_policy(
    memory: MemoryPolicy, batch: BatchPolicy = DEFAULTS.batch, restart: RestartPolicy = DEFAULTS.restart
) -> RunPolicy:
    return RunPolicy(memory, batch, restart)
