"""The faults of a world and the policy of its run, both drawn from a seed."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.core.policies import batch_policy, memory_policy, restart_policy, run_policy

from mlx_supervisor.core.policy import MIB, RunPolicy

LIMIT_MIB = 2200
MACHINE_MIB = 4096


@dataclass(frozen=True)
class Faults:
    """Memory in MiB, durations in seconds. A plain share is a chance: per step, start, message, sample or call."""

    # the worker's memory
    base_mib: float = 300.0
    per_sample_mib: float = 60.0
    leak_mib: float = 0.0
    cache_mib: float = 0.0
    noise_mib: float = 5.0
    spike: float = 0.0
    evaluation_mib: float = 0.0
    misread: float = 0.0
    # what the worker does
    step_s: float = 0.3
    evaluate_every: int = 0
    save_every: int = 12
    save_s: float = 0.2
    save_fails: float = 0.0
    load_s: float = 2.0
    never_ready: bool = False
    load_dies: float = 0.0
    # how the worker dies: chances per step
    crash: float = 0.0
    not_finite: float = 0.0
    device_oom: float = 0.0
    resource_limit: float = 0.0
    gpu_watchdog: float = 0.0
    gpu_error: float = 0.0
    out_of_memory: float = 0.0
    oom_kill: float = 0.0
    killed: float = 0.0
    interrupted: float = 0.0
    exit_0: float = 0.0
    hang: float = 0.0
    crash_at_step: int = 0
    not_finite_at_step: int = 0
    refuses: bool = False
    wrong_batch: bool = False
    # how the worker ignores requests and signals
    ignores_stop: bool = False
    ignores_term: bool = False
    dies_slowly_s: float = 0.0
    unkillable: float = 0.0
    # its messages and samples
    lost: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    ancient: float = 0.0
    missing: float = 0.0
    blind_spell: float = 0.0
    late_sample: float = 0.0
    # its machine; `…_after_s`: mean time between two of them, 0 for never
    others_mib: float = 0.0
    memory_lingers_s: float = 0.0
    sleeps_after_s: float = 0.0
    stalls_after_s: float = 0.0
    # commands, the disk, and failing requests
    commands_after_s: float = 0.0
    spawn_fails: float = 0.0
    spawn_fails_for_good: float = 0.0
    start_blocked: float = 0.0
    journal_fails: float = 0.0
    request_fails: float = 0.0
    # chances per event
    supervisor_dies: float = 0.0
    reboots: float = 0.0

    @property
    def death(self) -> float:
        """Probability per step of any death."""
        return float(sum(getattr(self, name) for name in DEATHS))


DEATHS = (
    "crash",
    "not_finite",
    "device_oom",
    "resource_limit",
    "gpu_watchdog",
    "gpu_error",
    "out_of_memory",
    "oom_kill",
    "killed",
    "interrupted",
    "exit_0",
    "hang",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"leak_mib": 5.0},
    {"leak_mib": 30.0, "cache_mib": 200.0},
    {"leak_mib": 100.0},
    {"leak_mib": 40.0, "save_fails": 1.0},
    {"per_sample_mib": 170.0, "noise_mib": 15.0},
    {"per_sample_mib": 300.0},
    {"per_sample_mib": 900.0, "cache_mib": 100.0},
    {"per_sample_mib": 1700.0, "cache_mib": 50.0},
    {"cache_mib": 1500.0},
    {"noise_mib": 60.0, "spike": 0.02},
    {"evaluate_every": 20, "evaluation_mib": 400.0},
    {"evaluate_every": 12, "evaluation_mib": 1500.0, "save_s": 4.0},
    {"crash": 0.02},
    {"not_finite": 0.01},
    {"device_oom": 0.01, "oom_kill": 0.01},
    {"resource_limit": 0.01, "gpu_watchdog": 0.01},
    {"killed": 0.02},
    {"interrupted": 0.01, "exit_0": 0.01},
    {"hang": 0.01},
    {"hang": 0.01, "ignores_term": True, "dies_slowly_s": 12.0},
    {"crash_at_step": 25},
    {"not_finite_at_step": 31},
    {"ignores_stop": True, "leak_mib": 40.0},
    {"ignores_stop": True, "ignores_term": True},
    {"unkillable": 0.2, "hang": 0.005, "killed": 0.005},
    {"unkillable": 0.2, "supervisor_dies": 0.004, "ignores_stop": True, "ignores_term": True},
    {"load_s": 50.0},
    {"never_ready": True},
    {"save_fails": 0.4},
    {"save_fails": 1.0, "crash": 0.02},
    {"save_s": 6.0},
    {"lost": 0.2},
    {"lost": 0.6, "exit_0": 0.01},
    {"late": 0.2},
    {"twice": 0.2, "ancient": 0.1},
    {"ancient": 0.3, "late": 0.1, "crash": 0.02},
    {"missing": 0.15, "late_sample": 0.1},
    {"blind_spell": 0.01, "missing": 0.05},
    {"others_mib": 2500.0},
    {"memory_lingers_s": 40.0, "per_sample_mib": 200.0},
    {"memory_lingers_s": 1e6, "hang": 0.01},
    {"sleeps_after_s": 60.0},
    {"stalls_after_s": 40.0},
    {"commands_after_s": 12.0},
    {"commands_after_s": 40.0},
    {"spawn_fails": 0.4, "crash": 0.01},
    {"spawn_fails": 0.9},
    {"spawn_fails_for_good": 0.3, "killed": 0.01},
    {"journal_fails": 0.3},
    {"request_fails": 0.5, "leak_mib": 60.0, "cache_mib": 400.0},
    {"supervisor_dies": 0.01},
    {"supervisor_dies": 0.002, "journal_fails": 0.2},
    {"reboots": 0.005},
    {"reboots": 0.02, "journal_fails": 0.5},
    {"base_mib": 2400.0},
    {"refuses": True},
    {"wrong_batch": True},
    {"missing": 1.0, "load_s": 8.0},
    {"leak_mib": 30.0, "cache_mib": 900.0, "commands_after_s": 5.0},
    {"leak_mib": 30.0, "cache_mib": 900.0, "killed": 0.05},
    {"journal_fails": 0.6, "supervisor_dies": 0.02},
    {"save_fails": 0.9, "exit_0": 0.02, "lost": 0.3},
    {"load_dies": 0.4, "load_s": 8.0},
    {"load_dies": 0.3, "memory_lingers_s": 60.0, "killed": 0.03},
    {"out_of_memory": 0.01, "gpu_error": 0.01},
    {"step_s": 0.02, "leak_mib": 5.0},
    {"misread": 0.5, "leak_mib": 30.0},
    {"misread": 1.0, "step_s": 0.02, "leak_mib": 5.0},
    {"start_blocked": 0.5, "killed": 0.01},
    {"start_blocked": 0.5, "commands_after_s": 20.0, "supervisor_dies": 0.005},
)


def drawn_faults(chance: Random) -> Faults:
    """One to four kinds of faults together."""
    chosen: dict[str, Any] = {"save_every": chance.choice((5, 12, 25))}
    for kind in chance.sample(KINDS, chance.choice((1, 2, 2, 3, 4))):
        chosen |= kind
    return Faults(**chosen)


def benign(faults: Faults) -> Faults:
    """No faults, but the same checkpoint interval."""
    return replace(Faults(), save_every=faults.save_every)


def drawn_policy(chance: Random) -> RunPolicy:
    """A random policy within what the settings allow."""
    of = chance.choice
    size = of((8, 8, 8, 6, 4, 1, None))
    minimum = 1 if size in (None, 1) else of((1, 1, 1, 2))
    start = None if size in (None, 1) else of((None, None, 2))
    batch = batch_policy(
        size,
        accumulation=of((1, 1, 2)),
        preserve_effective=of((True, True, False)),
        minimum=minimum,
        start=start,
        grow_after_steps=of((15, 40, 200)),
        halve_on_leak=of((True, False)),
    )
    memory = memory_policy(
        LIMIT_MIB * MIB,
        confirm_samples=of((1, 2, 2, 3)),
        missing_samples=of((4, 8, 20)),
        clear_first=of((True, True, False)),
        gradient_checkpointing=of(("last_resort", "last_resort", "always", "never")),
        autopsy=of((True, False)),
        autopsy_limit_s=of((0.5, 5.0)),
    )
    restart = restart_policy(
        max_without_progress=of((2, 3, 6)),
        max_memory_without_progress=of((2, 5)),
        max_same_error=of((1, 2, 3)),
        max_external=of((1, 3)),
        max_reboots=of((1, 3)),
        backoff_s=of((0.0, 1.0, 1.0)),
        healthy_s=of((10.0, 600.0)),
        wait_for_memory_s=of((20.0, 120.0)),
        reboot_cooldown_s=of((1.0, 30.0)),
        start_timeout_s=of((30.0, 120.0)),
        stop_grace_s=of((5.0, 20.0)),
        term_grace_s=of((2.0, 10.0)),
        kill_wait_s=of((2.0, 10.0)),
        hang_timeout_s=of((None, 15.0, 15.0, 30.0)),
        close_after_steps=of((5, 20)),
    )
    return run_policy(memory, batch, restart)


def steady_policy(chance: Random, limit_mib: int = LIMIT_MIB) -> RunPolicy:
    """One policy for tests of a single fault."""
    return run_policy(
        memory_policy(limit_mib * MIB, missing_samples=8),
        batch_policy(8, grow_after_steps=chance.choice((40, 200))),
        restart_policy(max_without_progress=6, hang_timeout_s=30.0, close_after_steps=20),
    )
