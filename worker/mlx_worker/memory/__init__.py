"""MLX's cache, and gradient checkpointing."""
