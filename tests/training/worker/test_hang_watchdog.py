"""The time that the worker's own watchdog allows for each kind of work."""

import faulthandler

import pytest

from mlx_worker.supervision.hang_watchdog import HangWatchdog


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every bound that was set, in seconds."""
    bounds: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda bound_s, **_options: bounds.append(bound_s))
    return bounds


def test_a_long_phase_gets_its_time_right_after_an_update(armed: list[float]) -> None:
    watchdog = HangWatchdog(10.0)
    watchdog.note_update(0.5)
    watchdog.arm(600.0)
    assert armed[-1] == 600.0
    watchdog.arm()
    assert armed[-1] < 600.0, "after the phase the update's own bound holds again"


def test_quick_updates_do_not_arm_it_each(armed: list[float]) -> None:
    watchdog = HangWatchdog(10.0)
    for _ in range(100):
        watchdog.note_update(0.001)
    assert len(armed) <= 2
