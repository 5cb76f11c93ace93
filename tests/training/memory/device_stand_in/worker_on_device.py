"""The real worker on a device that is not there: MLX's counters are those of the CPU, SCALE times as large.

Run as `python worker_on_device.py JOB_FILE`; the file that FAKE_DEVICE names has the device's state: its total, what
other processes hold, and what this process holds, which is written here whenever it changes.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

SCALE = 100
CONTEXT_BYTES = 600 * 2**20
"""What the driver charges beyond the counters."""
OOM = "cudaMallocAsync(&data, size, stream) failed: out of memory"
STATE = Path(os.environ["FAKE_DEVICE"])
cpu = SimpleNamespace(
    **{name: getattr(mx, name) for name in ("get_active_memory", "get_cache_memory", "get_peak_memory", "full")},
    set_cache_limit=mx.set_cache_limit,
)


def read():
    return json.loads(STATE.read_text())


def counted():
    return SCALE * (cpu.get_active_memory() + cpu.get_cache_memory())


def note(used_bytes):
    temporary = STATE.with_suffix(".worker")
    temporary.write_text(json.dumps(read() | {"pid": os.getpid(), "used": used_bytes}))
    temporary.replace(STATE)


def device_info(*_):
    now, held = read(), counted() + CONTEXT_BYTES
    note(held)
    free = now["total"] - now["others"] - held
    return {"uuid": now["uuid"], "total_memory": now["total"], "free_memory": max(free, 0)}


def full(shape, value, dtype=mx.float32, **more):
    """A drill's arrays, in this machine's memory SCALE times smaller."""
    if dtype is not mx.uint8:
        return cpu.full(shape, value, dtype, **more)
    now, used = read(), counted() + shape[0] + CONTEXT_BYTES
    if used > now["total"] - now["others"]:
        raise RuntimeError(OOM)
    array = cpu.full((shape[0] // SCALE,), value, dtype)
    mx.eval(array)
    note(used)
    return array


def active():
    note(counted() + CONTEXT_BYTES)
    return SCALE * cpu.get_active_memory()


mx.device_info, mx.full, mx.get_active_memory = device_info, full, active
mx.get_cache_memory = lambda: SCALE * cpu.get_cache_memory()
mx.get_peak_memory = lambda: SCALE * cpu.get_peak_memory()
mx.set_cache_limit = lambda limit: cpu.set_cache_limit(limit // SCALE) * SCALE

if __name__ == "__main__":
    from mlx_worker.__main__ import main
    from mlx_worker.memory import device

    device.mx = SimpleNamespace(
        **vars(mx) | {"default_device": lambda: SimpleNamespace(type=mx.DeviceType.gpu)}
    )  # only here: everything is still computed on the CPU
    sys.exit(main())
