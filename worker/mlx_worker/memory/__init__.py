"""What becomes of MLX's cache, and gradient checkpointing."""
