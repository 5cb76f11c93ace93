"""Finds the cause of every death of a worker."""
