"""`python -m mlx_supervisor` is the command `mlx-supervisor`."""

from mlx_supervisor.cli.main import main

if __name__ == "__main__":
    main()
