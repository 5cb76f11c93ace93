"""A worker that only allocates memory, at a steady rate, until it is killed; it sends no telemetry.

    python bench/support/ramp.py RATE_MIB_PER_S LIMIT_MIB JOB

Before and after every chunk it records its memory in `ramp.bin` in the run's folder, a mapped file that survives the
process. Six little-endian 64-bit numbers: charged bytes at the start, bytes requested, bytes touched, and the times of
the start, of reaching the limit, and of the last chunk (nanoseconds of the monotonic clock).
"""

import json
import mmap
import os
import struct
import sys
import time
from pathlib import Path

from mlx_supervisor.host.footprint import readers

RECORD = struct.Struct("<6q")
CHUNK_BYTES = 256 * 1024
FAST_BYTES_PER_S = 2**30
"""From this rate on, chunks of one huge page each: one process cannot touch small pages faster."""
FAST_CHUNK_BYTES = 2 * 2**20
END_AT_LIMITS = 2
"""A ramp that is not killed ends at this multiple of the limit."""


def main() -> None:
    rate_bytes_per_s, limit_bytes = int(sys.argv[1]) * 2**20, int(sys.argv[2]) * 2**20
    folder = Path(json.loads(Path(sys.argv[3]).read_bytes())["run_dir"])
    with (folder / "ramp.bin").open("w+b") as file:
        file.truncate(RECORD.size)
        record = mmap.mmap(file.fileno(), RECORD.size)
    # One private mapping: Python's default is shared memory, whose pages come too slowly for 1 GiB/s.
    room = mmap.mmap(-1, END_AT_LIMITS * limit_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    fast = rate_bytes_per_s >= FAST_BYTES_PER_S
    chunk_bytes = FAST_CHUNK_BYTES if fast else CHUNK_BYTES
    room.madvise(mmap.MADV_HUGEPAGE if fast else mmap.MADV_NOHUGEPAGE)
    touch = b"\1" * (chunk_bytes // mmap.PAGESIZE)
    read, _ = readers()
    base, touched, crossed_ns = read(os.getpid()).charged_bytes, 0, 0
    start_ns = time.monotonic_ns()
    while touched < len(room):
        due = rate_bytes_per_s * (time.monotonic_ns() - start_ns) // 10**9
        if touched >= due:
            time.sleep(chunk_bytes / rate_bytes_per_s / 4)
            continue
        requested = touched + chunk_bytes
        RECORD.pack_into(record, 0, base, requested, touched, start_ns, crossed_ns, time.monotonic_ns())
        room[touched : requested : mmap.PAGESIZE] = touch
        touched, now_ns = requested, time.monotonic_ns()
        if not crossed_ns and base + touched >= limit_bytes:
            crossed_ns = now_ns
        RECORD.pack_into(record, 0, base, requested, touched, start_ns, crossed_ns, now_ns)


if __name__ == "__main__":
    main()
