"""How an error names a key of the settings file."""

from mlx_supervisor import wire


def settings_key(job: wire.Job, key: str) -> str:
    """`/home/me/settings.toml: runs.night.task.entry` for the run's key `task.entry`."""
    return f"{job.settings_file}: runs.{job.run}.{key}" if job.settings_file else key
