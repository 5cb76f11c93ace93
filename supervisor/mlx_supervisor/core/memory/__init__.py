"""Judges memory: the breaker, the growth behind it, and whether there is room to start."""
