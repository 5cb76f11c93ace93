"""The memory breaker, the growth that it detects, and the wait for memory before a start."""
