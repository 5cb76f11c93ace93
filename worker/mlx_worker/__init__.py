"""The trainer: one process per run, started by the supervisor, stopped by it or by its own end."""
