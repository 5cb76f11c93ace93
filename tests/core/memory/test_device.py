"""The account of a device with its own memory."""

import pytest
from tests.core.policies import memory_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.device import DeviceAccount, first_to_limit
from mlx_supervisor.core.memory.growth import Growth
from mlx_supervisor.core.policy import MIB

LIMIT_MIB = 24 * 1024
TOTAL_MIB = 80 * 1024


def report(step: int, active_mib: float, cache_mib: float = 0, peak_mib: float = 0) -> ev.StepReport:
    active, cache, peak = (int(each * MIB) for each in (active_mib, cache_mib, peak_mib))
    shape = (step, 1.0, 1, 1, 1e-4, 0.3, 1, 1)
    return ev.StepReport(0.3 * step, 1, *shape, active, cache, peak_bytes=peak, device_limit_bytes=LIMIT_MIB * MIB)


def account() -> DeviceAccount:
    device = DeviceAccount(memory_policy(1024 * MIB), 10)
    device.begin_generation()
    device.found(ev.DeviceFound(0.0, 1, TOTAL_MIB * MIB, LIMIT_MIB * MIB, "GPU-1"))
    return device


def test_a_leak_on_the_device_is_shown_within_twenty_steps() -> None:
    device = account()
    for step in range(1, 21):
        assert device.step(report(step, 1000 + 500 * step), at_minimum=False) is None
    shown = first_to_limit(device, Growth(0.0, {"native": 0.0}))
    assert shown.bytes_per_step == pytest.approx(500 * MIB, rel=0.01)
    assert shown.by_cause["arrays"] == pytest.approx(500 * MIB, rel=0.01)


def test_a_repeated_report_changes_nothing() -> None:
    device = account()
    for step in (1, 2, 2, 1, 3, 3, *range(4, 30)):
        assert device.step(report(step, 1000), at_minimum=False) is None


def test_a_peak_over_the_limit_counts_when_confirmed() -> None:
    device = account()
    assert device.step(report(1, 1000, peak_mib=LIMIT_MIB + 1), at_minimum=False) is None
    assert device.step(report(2, 1000, peak_mib=LIMIT_MIB + 1), at_minimum=False) is not None


def test_without_a_device_nothing_is_judged() -> None:
    device = DeviceAccount(memory_policy(1024 * MIB), 10)
    device.begin_generation()
    assert device.sample(ev.DeviceSample(0.0, 1, TOTAL_MIB * MIB, 0, TOTAL_MIB * MIB)) is None
    host = Growth(1.0)
    assert first_to_limit(device, host) is host
    assert device.use_at_death(None) is None


def test_the_driver_names_who_held_the_memory_where_the_worker_could_not() -> None:
    device = account()
    device.step(report(1, 20 * 1024), at_minimum=False)
    device.sample(ev.DeviceSample(1.0, 1, 20 * 1024 * MIB, 3 * 1024 * MIB, TOTAL_MIB * MIB))
    use = device.use_at_death(None)
    assert use is not None
    assert use.crowded
    assert use.text == "this run held 20.0 GiB, other processes held 57.0 GiB of 80.0 GiB"
