"""`mlx-supervisor` with a timer for its first kill; bench/overshoot.py runs it.

Writes to the file that `BENCH_KILL_RECORD` names, in seconds of the monotonic clock: when reading the deciding sample
began, when it ended, and when the kill call returned.
"""

import json
import os
import sys
import time
from pathlib import Path

from mlx_supervisor.host.footprint import Footprint, Gauge
from mlx_supervisor.process.child import Child

RECORD = "BENCH_KILL_RECORD"


def main() -> None:
    record = Path(os.environ[RECORD])
    latest = {"sampled_s": 0.0, "measured_s": 0.0}
    measure, brake = Gauge.measure, Child.brake

    def timed_measure(self: Gauge) -> Footprint | None:
        sampled_s = time.monotonic()
        found = measure(self)
        latest.update(sampled_s=sampled_s, measured_s=time.monotonic())
        return found

    def timed_brake(self: Child) -> None:
        brake(self)
        killed_s = time.monotonic()
        if not record.exists():
            record.write_text(json.dumps({**latest, "killed_s": killed_s}))

    Gauge.measure = timed_measure  # type: ignore[method-assign]
    Child.brake = timed_brake  # type: ignore[method-assign]
    from mlx_supervisor.cli.main import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
