"""Exit statuses, environment variables, the disk reserve and the disk's errors of the worker."""

import errno

STDERR_TAIL_LIMIT_BYTES = 16 * 1024
RESERVE_BYTES = 64 * 1024 * 1024
"""Disk space that every checkpoint leaves free, for logs and the journal."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO})
"""The disk is full, read-only, failing or unplugged, or its server does not answer: a later attempt may succeed."""
EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75
"""Stopped on request, checkpointed first (sysexits' EX_TEMPFAIL: try again later)."""
EXIT_NOT_FINITE = 65
"""The loss is NaN or infinite (sysexits' EX_DATAERR); no checkpoint holds that update."""
EXIT_HANG = 70
"""The worker's own watchdog ended it (sysexits' EX_SOFTWARE). The last line of its stderr begins with HANG_LINE."""
HANG_LINE = "watchdog: no progress for"
EXIT_REFUSED = 78
"""The job can't be done, and a restart would not help (sysexits' EX_CONFIG)."""
TOKEN_VARIABLE = "MLX_SUPERVISOR_TOKEN"  # noqa: S105 - the variable's name
"""Environment variable with the secret that the worker's hello must show; it also marks the worker's descendants."""
LIFELINE_VARIABLE = "MLX_SUPERVISOR_LIFELINE"
"""Environment variable with the number of a pipe's read end; end of file there means that the supervisor died."""
LOCK_VARIABLE = "MLX_SUPERVISOR_LOCK"
"""Environment variable with the numbers of the open files that hold the lock of the run's folder, with commas."""
