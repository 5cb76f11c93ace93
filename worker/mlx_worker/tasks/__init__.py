"""What can be trained: a Python task, or an mlx_lm configuration."""
