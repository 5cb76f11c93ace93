"""Keep the machine from sleeping while a worker lives: `caffeinate` on macOS, nothing elsewhere."""

import contextlib
import subprocess
import sys

CAFFEINATE = "/usr/bin/caffeinate"


def command_for(pid: int) -> list[str]:
    """-i: no idle sleep; -w: until that process exits, so nothing is left behind when the supervisor dies."""
    return [CAFFEINATE, "-i", "-w", str(pid)]


class Caffeinate:
    """One assertion for one worker at a time."""

    def __init__(self, enabled: bool = sys.platform == "darwin") -> None:
        self._enabled = enabled
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self, pid: int) -> str | None:
        """Keep awake for as long as `pid` lives. None when that is so or not needed, else why it is not."""
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
        """The worker is gone: reap `caffeinate`, or end it. Never raises, waits a second at most."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()  # it holds nothing but the assertion, which goes with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
