"""Bounded log files: the daemon's own, and each run's."""
