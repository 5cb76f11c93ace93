"""The ids of every update's samples, one JSON line per update."""

import json
import sys
from pathlib import Path

from mlx_supervisor import wire
from mlx_worker.data.line_log import LineLog

FILE = "samples.jsonl"


class SampleLog:
    """Appends to `samples.jsonl` of the run's folder, if the job turns it on.

    A failing disk ends neither the run nor the log: the lines wait in memory. Lines that are lost are named.
    """

    def __init__(self, job: wire.Job) -> None:
        self._generation = job.generation
        self._log: LineLog | None = None
        self._failing = False
        self._dropped: list[int] = []  # the first and the last step without a line, and how many there are
        if job.batch.sample_log:
            self._log = LineLog(Path(job.run_dir) / FILE)
            self._report(self._log)

    def write(self, step: int, epoch: int, ids: list[int]) -> None:
        """Log a completed update. `epoch` is that of its first sample."""
        if self._log is None:
            return
        line = {"generation": self._generation, "step": step, "epoch": epoch, "samples": ids}
        if not self._log.write(json.dumps(line)):
            self._drop(step)
        self._report(self._log)

    def flush(self) -> None:
        """Try now to write the lines that wait for the disk."""
        if self._log is not None and self._log.waiting:
            self._log.flush()
            self._report(self._log)

    def close(self) -> None:
        """Write what is still possible; lines that are lost are printed as a range of steps."""
        if self._log is None:
            return
        error = self._log.error
        for line in self._log.close():
            self._drop(json.loads(line)["step"])
        if self._dropped:
            first, last, count = self._dropped
            which = f"step {first}" if first == last else f"{count:,} of steps {first} to {last}"
            print(f"{FILE} lacks lines: {which} ({self._log.error or error or 'too many waited'})", file=sys.stderr)
        self._log = None

    def _drop(self, step: int) -> None:
        first, last, count = self._dropped or (step, step, 0)
        self._dropped = [min(first, step), max(last, step), count + 1]

    def _report(self, log: LineLog) -> None:
        """Print when writing begins to fail and when it works again."""
        if bool(log.error) != self._failing:
            self._failing = not self._failing
            text = f"cannot write {FILE} ({log.error}); its lines are kept in memory and written later"
            print(text if self._failing else f"{FILE} is written again", file=sys.stderr)
