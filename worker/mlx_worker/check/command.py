"""The worker's part of `mlx-supervisor check`: its report is a file, since the user's code may print anything."""

import sys
import traceback
from pathlib import Path

from mlx_supervisor import wire
from mlx_supervisor.wire.check import CheckReport, MeasureReport
from mlx_worker.checkpoint import durable_files
from mlx_worker.errors import RefusedError
from mlx_worker.supervision.raised import errors_of
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.tasks import mistakes
from mlx_worker.training import determinism, inputs


def run(job: wire.Job, file: Path, stop: StopFlag, *, measures: bool, checkpoints: Path | None) -> int:
    """Examine the job, or measure a few of its updates; write the report to `file`. Returns the exit status."""
    report: CheckReport | MeasureReport
    status = wire.EXIT_COMPLETED
    try:
        determinism.prepare(job.deterministic)
        found = inputs.read(job)
        from mlx_worker.check import facts, measure  # importing MLX takes seconds

        with mistakes.refused(job, lambda: 0):
            report = measure.measure(job, stop, found) if measures else facts.examine(job, found, checkpoints)
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        problem = str(error) if isinstance(error, RefusedError) else errors_of(error)[0].message
        if not isinstance(error, RefusedError):
            problem = f"{type(error).__name__}: {problem}"
            traceback.print_exception(error)
        problems = [" ".join(problem.split())]
        report = MeasureReport(problems=problems, batch_size=0) if measures else CheckReport(problems=problems)
        status = wire.EXIT_REFUSED if isinstance(error, RefusedError) else wire.EXIT_FAILED
    durable_files.replace_file(file, lambda new: new.write(wire.dump_json(report)))
    sys.stdout.flush()
    return status
