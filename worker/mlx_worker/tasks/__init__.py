"""The two kinds of task: a Python function, or an mlx_lm configuration."""
