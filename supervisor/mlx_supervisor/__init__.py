"""Supervisor of MLX training runs: starts a worker, watches its memory, restarts it from its last checkpoint."""

__version__ = "0.1.0"
