"""Errors of a python task's code that a restart would repeat, as refusals that name the settings' key and the line."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_supervisor import wire
from mlx_worker.checkpoint.manifest import has_checkpoint
from mlx_worker.errors import RefusedError
from mlx_worker.supervision.raised import errors_of
from mlx_worker.tasks.settings_key import settings_key

MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, FileNotFoundError, ImportError, LookupError, NameError,
    NotImplementedError, RecursionError, SyntaxError, SystemExit, TypeError, ValueError,
)  # fmt: skip
"""Errors that the same code raises every time; others, such as a full device or a lost connection, may pass."""
MESSAGE_SHOWN = 400
"""Characters of the error's message."""


@contextmanager
def refused(job: wire.Job, steps: Callable[[], int]) -> Iterator[None]:
    """Refuse a mistake before the run's first update. `steps`: updates that this process has made.

    With a checkpoint, or after an update, errors pass through: what worked before may work again. Raises RefusedError.
    """
    where = f"{settings_key(job, 'task.entry')}: {job.task.entry}: "
    try:
        yield
    except RefusedError as error:
        if job.task.kind == "python" and str(error).startswith("Task."):
            raise RefusedError(f"{where}{error}") from error
        raise
    except MISTAKES as error:
        if job.task.kind != "python" or steps() or has_checkpoint(Path(job.run_dir)):
            raise
        traceback.print_exception(error)  # to stderr.log: the refusal has one line of it
        raise RefusedError(f"{where}{described(error)}{_log(job)}") from error


def described(error: BaseException) -> str:
    """`ValueError: no such column (mine.py:19)`."""
    raised = errors_of(error)[0]
    place = f" ({raised.file}:{raised.line})" if raised.file and not raised.file.startswith("<") else ""
    return f"{type(error).__name__}: {' '.join(raised.message.split())[:MESSAGE_SHOWN]}{place}"


def _log(job: wire.Job) -> str:
    log = Path(job.run_dir) / "logs" / "stderr.log"
    return f"; the traceback is in {log}" if log.exists() else ""  # unsupervised, it is on the terminal
