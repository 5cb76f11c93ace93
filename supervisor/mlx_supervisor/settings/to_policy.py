"""From a run's settings to the policy that the core goes by."""

from mlx_supervisor.core.policy import MIB, BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy
from mlx_supervisor.settings import validation
from mlx_supervisor.settings.schema import RunSettings, SettingsError
from mlx_supervisor.settings.sizes import check_smallest
from mlx_supervisor.settings.sizes import parse_bytes as parse_bytes


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
        key = validation.join_dotted(where, "memory.limit")
        raise SettingsError([f"{key}: found {validation.show(run.memory.limit)}; allowed: {error}"]) from None
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
