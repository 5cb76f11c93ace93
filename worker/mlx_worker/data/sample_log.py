"""The ids of every update's samples, one JSON line per update."""

import json
import sys
from pathlib import Path
from typing import TextIO

from mlx_supervisor import wire


class SampleLog:
    """Appends to `samples.jsonl` of the run's folder, if the job turns it on. A full disk ends the log, not the run."""

    def __init__(self, job: wire.Job) -> None:
        self._generation = job.generation
        self._file: TextIO | None = None
        if job.batch.sample_log:
            self._file = (Path(job.run_dir) / "samples.jsonl").open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, epoch: int, ids: list[int]) -> None:
        """Log a completed update. `epoch` is that of its first sample."""
        if self._file is None:
            return
        line = {"generation": self._generation, "step": step, "epoch": epoch, "samples": ids}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"samples.jsonl ends before step {step}, which could not be written: {error}", file=sys.stderr)
            self._file = None
