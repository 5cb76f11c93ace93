"""`python -m mlx_worker JOB --check FILE`: a job examined without training, or measured by a few updates."""
