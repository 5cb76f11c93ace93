"""`mlx-supervisor` with a timer for its first kill; bench/overshoot.py runs it.

Writes to the file that `BENCH_KILL_RECORD` names, in seconds of the monotonic clock: when reading the deciding sample
began, when the event loop received it, and when the kill call returned.
"""

import json
import os
import sys
import time
from pathlib import Path

from mlx_supervisor.core.events import Event, Sample
from mlx_supervisor.daemon import run
from mlx_supervisor.process.child import Child

RECORD = "BENCH_KILL_RECORD"


def main() -> None:
    record = Path(os.environ[RECORD])
    latest = {"sampled_s": 0.0, "received_s": 0.0}
    post, kill = run.SupervisedRun.post, Child.kill

    def timed_post(self: run.SupervisedRun, event: Event) -> None:
        if isinstance(event, Sample):
            latest.update(sampled_s=event.at_s, received_s=time.monotonic())
        post(self, event)

    def timed_kill(self: Child) -> None:
        kill(self)
        killed_s = time.monotonic()
        if not record.exists():
            record.write_text(json.dumps({**latest, "killed_s": killed_s}))

    run.SupervisedRun.post = timed_post  # type: ignore[method-assign]
    Child.kill = timed_kill  # type: ignore[method-assign]
    from mlx_supervisor.cli.main import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
