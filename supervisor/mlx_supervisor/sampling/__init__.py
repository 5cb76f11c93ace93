"""Timing of memory readings: of each worker, and of the machine."""
