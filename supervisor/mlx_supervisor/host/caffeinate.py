"""Keep the machine awake while a worker runs: `caffeinate` on macOS, nothing elsewhere."""

import contextlib
import subprocess
import sys

CAFFEINATE = "/usr/bin/caffeinate"


def command_for(pid: int) -> list[str]:
    """-i: no idle sleep; -w: until that process exits, so it ends even when the supervisor dies."""
    return [CAFFEINATE, "-i", "-w", str(pid)]


class Caffeinate:
    """One assertion for one worker at a time."""

    def __init__(self, enabled: bool = sys.platform == "darwin") -> None:
        self._enabled = enabled
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self, pid: int) -> str | None:
        """Keep awake until `pid` ends. Returns why that failed, or None."""
        self.release()
        if not self._enabled:
            return None
        try:
            self._process = subprocess.Popen(
                command_for(pid), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            return f"the machine may fall asleep: {CAFFEINATE}: {error}"
        return None

    def release(self) -> None:
        """End `caffeinate` and reap it. Never raises, waits a second at most."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()  # it holds only the assertion, which ends with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
