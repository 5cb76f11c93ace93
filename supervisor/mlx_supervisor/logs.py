"""The supervisor's own log, and the stdout and stderr of each run; all rotated, none ever in the way of its writer."""

import contextlib
import logging
import os
import re
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog

LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 3
LINE_LIMIT = 8192
TAIL_LIMIT_BYTES = 16 * 1024
_COPY_BYTES = 1024 * 1024
_MODE = 0o600

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class _PrivateFile(RotatingFileHandler):
    """Mode 0600; a log that cannot be written loses lines, counts them and says so once lines fit again."""

    def __init__(self, path: Path) -> None:
        self.lost = 0
        super().__init__(
            path, maxBytes=LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8", errors="replace", delay=True
        )

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _MODE)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)  # noqa: PTH123 - a descriptor

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count; never print, never raise."""
        self.lost += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; first, after a gap, how much is missing."""
        lost, self.lost = self.lost, 0
        if lost:
            gap = logging.LogRecord("logs", logging.WARNING, "", 0, f"{lost} lines of this log were lost", (), None)
            super().emit(gap)
            if self.lost:
                self.lost = lost + 1
                return
        super().emit(record)


def configure(log_path: Path | None, console: bool, level: str = "info") -> None:
    """Send structlog's lines, and the standard library's, as JSON to a rotated file and readable to stderr.

    `log_path` None: no file. `console`: also to stderr, in colour on a terminal. May be called again. A log file that
    cannot be opened or written never raises into a caller: its lines are lost and counted.
    Raises ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"found the log level {level!r}; allowed: debug, info, warning, error, critical")
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
    _install(handlers or [logging.NullHandler()], number)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )


class _Quiet(logging.StreamHandler[TextIO]):
    """A terminal that went away is no reason for tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing: the line is in the file."""


def _formatter(
    shared: list[structlog.typing.Processor], renderer: structlog.typing.Processor
) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )


def _install(handlers: list[logging.Handler], level: int) -> None:
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if getattr(handler, "_of_mlx_supervisor", False)]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler._of_mlx_supervisor = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(level)


class RunLog:
    """`stdout.log` and `stderr.log` of one run. A worker inherits the descriptors; both sides append.

    Rotation copies and truncates, so a worker's descriptor stays good: every writer must append (O_APPEND). What a
    worker writes between the copy and the truncation is lost; that is a moment in 10 MiB. A file that grew past twice
    `max_bytes` between two looks leaves only its last `max_bytes` behind.
    Raises OSError when the files cannot be opened.
    """

    def __init__(self, folder: Path, max_bytes: int = LOG_BYTES, backups: int = LOG_BACKUPS) -> None:
        self.folder = folder
        self.stdout_path = folder / "stdout.log"
        self.stderr_path = folder / "stderr.log"
        self.lost = 0
        """Lines and rotations that the disk refused."""
        self._max_bytes = max_bytes
        self._backups = backups
        self._stderr_gone = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._stdout = os.open(self.stdout_path, flags, _MODE)
        try:
            self._stderr = os.open(self.stderr_path, flags, _MODE)
        except OSError:
            os.close(self._stdout)
            raise

    def descriptors(self) -> tuple[int, int]:
        """For a worker's stdout and stderr; they stay ours to close."""
        return self._stdout, self._stderr

    def line(self, text: str) -> None:
        """Append one whole line to stdout.log; control characters other than tab become spaces. Never raises."""
        data = _CONTROL.sub(" ", text)[:LINE_LIMIT].encode("utf-8", "replace") + b"\n"
        try:
            if os.write(self._stdout, data) != len(data):
                self.lost += 1
        except OSError:
            self.lost += 1

    def stderr_offset(self) -> int:
        """Where stderr ends now, with what was rotated away: take it before a life, give it to `tail_since` after."""
        try:
            return self._stderr_gone + os.fstat(self._stderr).st_size
        except OSError:
            return self._stderr_gone

    def tail_since(self, offset: int, limit_bytes: int = TAIL_LIMIT_BYTES) -> str:
        """The end of stderr, from `offset` at the earliest, also where the rotation has just taken it away.

        A file that somebody else cut short is read from its start.
        """
        try:
            size = os.fstat(self._stderr).st_size
            start = offset - self._stderr_gone
            data = os.pread(self._stderr, limit_bytes, max(start if start <= size else 0, size - limit_bytes, 0))
            if start < 0 and len(data) < limit_bytes:
                data = self._end_of_copy(min(-start, limit_bytes - len(data))) + data
        except OSError as error:
            return f"(stderr.log cannot be read: {error})"
        return data.decode("utf-8", "replace")

    def _end_of_copy(self, size_bytes: int) -> bytes:
        try:
            with _backup(self.stderr_path, 1).open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - size_bytes, 0))
                return file.read(size_bytes)
        except OSError:  # no copies are kept, or the disk had no room for it
            return b""

    def rotate_if_needed(self) -> bool:
        """Rotate a file over its limit; True when one was. A failure is counted, and tried again the next time."""
        rotated = False
        for descriptor, path in ((self._stdout, self.stdout_path), (self._stderr, self.stderr_path)):
            try:
                if os.fstat(descriptor).st_size > self._max_bytes:
                    self._rotate(descriptor, path)
                    rotated = True
            except OSError:
                self.lost += 1
        return rotated

    def _rotate(self, descriptor: int, path: Path) -> None:
        try:
            for number in range(self._backups - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    _backup(path, number).rename(_backup(path, number + 1))
            if self._backups:
                self._copy_end(descriptor, _backup(path, 1))
        finally:
            # a disk too full for the copy needs the room all the more
            self._empty(descriptor)

    def _empty(self, descriptor: int) -> None:
        if descriptor == self._stderr:
            self._stderr_gone += os.fstat(descriptor).st_size
        os.ftruncate(descriptor, 0)

    def _copy_end(self, descriptor: int, target: Path) -> None:
        size = os.fstat(descriptor).st_size
        position = 0 if size <= 2 * self._max_bytes else size - self._max_bytes
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            while position < size and (data := os.pread(descriptor, min(_COPY_BYTES, size - position), position)):
                position += os.write(out, data)
        finally:
            os.close(out)

    def clear(self) -> None:
        """Empty both files and remove their older copies. Raises OSError."""
        for descriptor, path in ((self._stdout, self.stdout_path), (self._stderr, self.stderr_path)):
            self._empty(descriptor)
            for number in range(1, self._backups + 1):
                _backup(path, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files; again: nothing."""
        descriptors, self._stdout, self._stderr = (self._stdout, self._stderr), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _backup(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
