"""`mlx-supervisor check`: what a run needs, examined without training; with `--measure`, its memory and speed."""
