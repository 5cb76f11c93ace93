"""A worker whose supervisor died ends what it has started, as nothing else would."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
from tests.process.harness import eventually

from mlx_supervisor.wire import LIFELINE_VARIABLE, TOKEN_VARIABLE

WORKER = """
import subprocess, sys, time
from mlx_worker.supervision.lifeline import watch_supervisor
from mlx_worker.supervision.stop import StopFlag
stop = StopFlag()
watch_supervisor(stop, 60.0)
hold = [sys.executable, "-c", "import time; time.sleep(600)"]
helpers = [subprocess.Popen(hold), subprocess.Popen(hold, start_new_session=True)]
print(*(each.pid for each in helpers), flush=True)
while not stop.requested and sys.stdin.read(1) == "":
    time.sleep(0.01)
sys.exit(75)
"""


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_helpers_end_with_a_worker_that_lost_its_supervisor(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    environment = os.environ | {LIFELINE_VARIABLE: str(read_end), TOKEN_VARIABLE: str(tmp_path)}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=[read_end],
        start_new_session=True,
        text=True,
    )
    os.close(read_end)
    assert worker.stdout is not None
    with worker.stdout:
        helpers = [int(pid) for pid in worker.stdout.readline().split()]
        assert [_runs(pid) for pid in helpers] == [True, True]
        os.close(write_end)
        assert worker.wait(30) == 75
        eventually(lambda: not any(_runs(pid) for pid in helpers))
