"""Which boot of the machine this is."""

from pathlib import Path


def boot_id() -> str:
    """What is different after every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS
        import psutil

        return f"boot time {psutil.boot_time():.0f}"
