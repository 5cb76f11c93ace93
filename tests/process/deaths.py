"""Ways for the misbehaving worker to die: real deaths where this machine allows them, else recorded ones."""

import concurrent.futures
import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlx_supervisor import wire

MIB = 1024 * 1024


def fail_as_recorded(worker: Any) -> None:
    """Send a bye with recorded `errors` (JSON), and exit as the worker does."""
    errors = [wire.Raised(**each) for each in json.loads(worker.args["errors"])]
    worker.bye("failed", f"{errors[0].kind}: {errors[0].message}", errors)
    os._exit(wire.EXIT_FAILED)


def die_as_recorded(worker: Any) -> None:
    """Write the recorded stderr of another process, and end as it did: `exit` is a code, or minus a signal."""
    os.write(2, Path(worker.args["stderr"]).read_bytes())
    how = worker.args["exit"]
    if how >= 0:
        os._exit(how)
    time.sleep(0.1)  # lets the messages sent before arrive
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(-how, signal.SIG_DFL)
    os.kill(os.getpid(), -how)


def memory_error(worker: Any) -> None:
    bytearray(1 << 60)


def full_disk(worker: Any) -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x")


def failed_handler(worker: Any) -> None:
    """Another error while one of CUDA's is handled."""
    try:
        raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")
    except RuntimeError as error:
        worker.args[str(error)]


def handled_long_ago(worker: Any) -> None:
    """A CUDA error that was caught and logged, then an error of the user's code."""
    print("skipped: RuntimeError: cudaMallocAsync(&data, size, stream) failed: out of memory", file=sys.stderr)
    worker.args["no such key"]


def segfault(worker: Any) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def segfault_near_limit(worker: Any) -> None:
    """As MLX on the CPU after a failed allocation: it writes to an invalid address."""
    page = resource.getpagesize()
    while int(Path("/proc/self/statm").read_text().split()[1]) * page < worker.args["hold_mib"] * MIB:
        worker.kept.append(bytearray(b"x" * MIB))
    time.sleep(1.0)  # long enough for many samples
    segfault(worker)


def user_error(worker: Any) -> None:
    """A mistake in the user's code."""
    raise KeyError("label")


def child_eats(worker: Any) -> None:
    """A loader process takes all memory."""
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        pool.submit(_eat).result()


def _eat() -> None:
    kept = []
    while True:
        kept.append(b"x" * MIB)


WAYS = {
    way.__name__: way
    for way in (
        fail_as_recorded,
        die_as_recorded,
        memory_error,
        full_disk,
        failed_handler,
        handled_long_ago,
        segfault,
        segfault_near_limit,
        user_error,
        child_eats,
    )
}
