"""Fine-tuning with an unchanged `mlx_lm.lora` configuration file."""
