"""Worker processes: how they start, end, and are found after a supervisor died."""
