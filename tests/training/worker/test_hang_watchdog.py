"""The worker's own watchdog: the time that it allows, and the time that it counts."""

import math
import signal
import subprocess
import sys
import time

import pytest

from mlx_supervisor import wire
from mlx_worker.supervision.hang_watchdog import HangWatchdog

PROGRAM = """
import sys, time
from mlx_worker.supervision.hang_watchdog import HangWatchdog
watchdog = HangWatchdog(0.8, lambda: True)
watchdog.note_update(0.1)
print("armed", flush=True)
end_s = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end_s:
    time.sleep(0.6)  # a step
    watchdog.note_update(0.1)
print("through", flush=True)
time.sleep(30)
"""
"""Its bound is 1.2 s."""


def test_a_long_phase_gets_its_time_right_after_an_update() -> None:
    watchdog = HangWatchdog(10.0)
    watchdog.note_update(0.5)
    assert watchdog.bound_s == 15.0
    watchdog.arm(600.0)
    assert watchdog.bound_s == 600.0
    watchdog.arm()
    assert watchdog.bound_s == 15.0, "after the phase the update's own bound holds again"
    watchdog.disarm()
    assert math.isinf(watchdog.bound_s)


@pytest.mark.parametrize("pause_s", [0.0, 3.0])
def test_only_time_in_which_the_process_ran_is_a_hang(pause_s: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pause_s + 1.5)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "armed\n"
        if pause_s:
            process.send_signal(signal.SIGSTOP)
            time.sleep(pause_s)
            process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=30)
    assert out == "through\n", err
    assert process.returncode == wire.EXIT_HANG
    assert "in <module>" in err, "every stack"
    assert err.endswith(f"{wire.HANG_LINE} 1.2 s; ending the worker\n")
