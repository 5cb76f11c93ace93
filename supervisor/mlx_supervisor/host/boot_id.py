"""Identifies the current boot of the machine."""

from pathlib import Path


def boot_id() -> str:
    """A text that differs after every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS
        import psutil

        return f"boot time {psutil.boot_time():.0f}"
