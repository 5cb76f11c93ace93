"""A run's settings as the policy of the core."""

from typing import Any

from mlx_supervisor.core.policy import KILL_WAIT_S, MIB, BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy
from mlx_supervisor.settings import validation
from mlx_supervisor.settings.schema import RunSettings, SettingsError
from mlx_supervisor.settings.sizes import SMALLEST_LIMIT_BYTES, bytes_of


def limit_bytes(run: RunSettings, machine_bytes: int, where: str = "") -> int:
    """The run's memory limit in bytes on a machine with `machine_bytes` of memory.

    `where` is the key of the run for the message, for example "runs.overnight". Raises SettingsError.
    """
    limit = bytes_of(run.memory.limit, machine_bytes)
    if SMALLEST_LIMIT_BYTES <= limit <= machine_bytes:
        return limit
    key = validation.join_dotted(where, "memory.limit")
    allowed = "at least 64 MiB" if limit < machine_bytes else f"at most this machine's memory, {_amount(machine_bytes)}"
    raise SettingsError([f"{key}: found {_amount(limit)}; allowed: {allowed}"])


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB ({size_bytes:,} bytes)"


def policy_of(run: RunSettings, machine_bytes: int, where: str = "") -> RunPolicy:
    """The run's thresholds. Raises SettingsError when the memory limit does not fit the machine."""
    return RunPolicy(
        memory=MemoryPolicy(
            limit_bytes=limit_bytes(run, machine_bytes, where),
            min_slope_bytes=run.memory.leak_mib_per_step * MIB,
            **_same_fields(MemoryPolicy, run.memory),
        ),
        batch=BatchPolicy(**_same_fields(BatchPolicy, run.batch)),
        restart=RestartPolicy(kill_wait_s=KILL_WAIT_S, **_same_fields(RestartPolicy, run.restart)),
        steps=run.steps,
    )


def _same_fields(policy: Any, settings: object) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in policy.__dataclass_fields__ if hasattr(settings, name)}
