"""What a command of `mlx-supervisor` works on: a run, named by files and options of the command line."""
