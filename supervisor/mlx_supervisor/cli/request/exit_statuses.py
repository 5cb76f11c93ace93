"""Exit statuses of `mlx-supervisor`'s commands."""

EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_WRONG_SETTINGS = 2
"""Also for wrong arguments, and for a run that its worker refused."""
EXIT_INTERRUPTED = 130
