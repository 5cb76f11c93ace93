"""The supervisor's own log: rotated, and never raising into its writer."""

import contextlib
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog

LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 3
MODE = 0o600


class _PrivateFile(RotatingFileHandler):
    """Mode 0600. Lines that can't be written are counted, and their number is logged once writing works again."""

    def __init__(self, path: Path) -> None:
        self.lost = 0
        super().__init__(
            path, maxBytes=LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8", errors="replace", delay=True
        )

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, MODE)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)  # noqa: PTH123 - a descriptor

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count the line; never print or raise."""
        self.lost += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; after a gap, first log how many are missing."""
        lost, self.lost = self.lost, 0
        if lost:
            gap = logging.LogRecord("logs", logging.WARNING, "", 0, f"log_lines_lost: {lost}", (), None)
            super().emit(gap)
            if self.lost:
                self.lost = lost + 1
                return
        super().emit(record)


def configure(log_path: Path | None, console: bool, level: str = "info") -> None:
    """Send the records of structlog and logging as JSON to a rotated file, and as text to stderr.

    `log_path` None: no file. `console`: also to stderr, in colour on a terminal. Replaces an earlier configuration. A
    log file that can't be opened or written never raises into a caller: its lines are lost and counted.
    Raises ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level: found {level!r}; allowed: debug, info, warning, error, critical")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handlers: list[logging.Handler] = []
    if log_path is not None:
        with contextlib.suppress(OSError):
            log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _PrivateFile(log_path)
        file.setFormatter(_formatter(shared, structlog.processors.JSONRenderer(default=str)))
        handlers.append(file)
    if console:
        stream = _Quiet(sys.stderr)
        stream.setFormatter(_formatter(shared, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())))
        handlers.append(stream)
    logging.basicConfig(handlers=handlers or [logging.NullHandler()], level=number, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )


class _Quiet(logging.StreamHandler[TextIO]):
    """Prints no tracebacks when the terminal has been closed."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Do nothing: the line is in the file."""


def _formatter(
    shared: list[structlog.typing.Processor], renderer: structlog.typing.Processor
) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
