"""What the operating system says: memory, processes, control groups, reports. One subject a file."""
