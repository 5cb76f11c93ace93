"""The task of first-run.toml."""
