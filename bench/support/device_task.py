"""The task of examples/first-run.toml with frozen embeddings, and a process that holds a device's memory.

On a GPU the gradient of an embedding is a sum in any order: with frozen ones, two runs end with the same bits.
Run as `python device_task.py LEAVE_GIB`: takes all memory but that, prints a line, and holds it until it is ended.
"""

import sys
import time
from typing import Any

CHUNK_BYTES = 2**30


def build(**args: Any) -> Any:
    """The task. `pause_s`: extra time per sample."""
    from first_run import stdlib_llama

    task = stdlib_llama.build(**args)
    task.model.model.embed_tokens.freeze()
    return task


def hold(leave_bytes: int) -> None:
    """Take the device's memory but `leave_bytes`."""
    import mlx.core as mx

    mx.set_cache_limit(0)
    kept = []
    while int(mx.device_info()["free_memory"]) > leave_bytes + CHUNK_BYTES:
        kept.append(mx.full((CHUNK_BYTES,), 1, dtype=mx.uint8))
        mx.eval(kept[-1])
    print(f"holding {len(kept)} GiB", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    hold(int(float(sys.argv[1]) * 2**30))
