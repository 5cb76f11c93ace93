"""Readings of the operating system: memory, processes, control groups, kill reports."""
