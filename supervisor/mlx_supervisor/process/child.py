"""Worker processes: started in their own session, signalled as a process group, ended with all their children."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlx_supervisor.host import jetsam
from mlx_supervisor.host.cgroup import OomKills
from mlx_supervisor.process.orphans import POLL_S, kill_group, kill_orphans
from mlx_supervisor.wire import LIFELINE_VARIABLE, LOCK_VARIABLE, TOKEN_VARIABLE

FOLLOW_INTERVAL_S = 2.0
"""How often a worker's control group is read; more often in the first seconds, when a wrapper may move it."""
JETSAM_WAIT_S = 2.0
"""How long to wait for macOS' report of a kill for memory."""


@dataclass(frozen=True)
class ExitStatus:
    """How the leader ended; both None when that is unknown. `oom_killed`: None where the kernel doesn't count."""

    exit_code: int | None
    signal: int | None
    oom_killed: bool | None


class Child:
    """One worker process. Its pid is also the id of its session and of its process group.

    Only this process holds the write end of the lifeline pipe: however it dies, the worker then reads end of file.
    """

    def __init__(self, process: subprocess.Popen[bytes], token: str, lifeline: int) -> None:
        self._process = process
        self._lifeline = lifeline
        self._oom_kills = OomKills(process.pid)
        self._killed = False
        self._reapable = threading.Lock()
        self.token = token
        self.pid = process.pid
        self.started_s = time.monotonic()
        self.create_time_s = _create_time_s(process.pid)

    @classmethod
    def spawn(
        cls, command: Sequence[str], cwd: Path, token: str, stdout: int, stderr: int, held: Sequence[int] = ()
    ) -> "Child":
        """Start `command`. `token` goes into its environment. Raises OSError when that fails.

        `held`: open files that it inherits, with the lock of the run's folder.
        """
        read_end, write_end = os.pipe()
        environment = os.environ | {TOKEN_VARIABLE: token, LIFELINE_VARIABLE: str(read_end)}
        environment[LOCK_VARIABLE] = ",".join(map(str, held))
        environment.pop("NOTIFY_SOCKET", None)  # only the supervisor may talk to the service manager
        try:
            process = subprocess.Popen(
                list(command),
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[read_end, *held],
                start_new_session=True,
            )
        except OSError:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        return cls(process, token, write_end)

    def terminate(self) -> None:
        """SIGTERM to the leader only: it checkpoints, and ends its own children."""
        self._process.terminate()

    def dump_stacks(self) -> None:
        """Make the leader write its stacks to its stderr (SIGUSR1)."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL to the whole process group, until the leader is reaped: `wait` ends the others."""
        self._killed = True
        if self._process.returncode is None:
            kill_group(self.pid)

    def brake(self) -> None:
        """As `kill`, from another thread, and only until the leader is reaped: its pid may be reused after that.

        Never waits.
        """
        if self._process.returncode is None and self._reapable.acquire(blocking=False):
            try:
                kill_group(self.pid)
                self._killed = True
            finally:
                self._reapable.release()

    def signal(self, number: int) -> None:
        """Any other signal, to the leader. Raises ProcessLookupError when it has ended."""
        if self._process.returncode is not None:
            raise ProcessLookupError(self.pid)
        self._process.send_signal(number)

    async def wait(self) -> ExitStatus:
        """Reap the leader, kill the rest of its group and all processes with its token, and return how it ended."""
        await self._ended()
        with self._reapable:
            code = self._process.wait()
        await kill_orphans(self.pid, self.token)
        os.close(self._lifeline)
        oom_killed = await self._oom_killed(code)
        if code < 0:
            return ExitStatus(None, -code, oom_killed)
        return ExitStatus(code, None, oom_killed)

    async def _oom_killed(self, code: int) -> bool | None:
        """By the kernel's count. macOS keeps none, but may write a report."""
        counted = self._oom_kills.happened()
        if counted is not None or code != -signal.SIGKILL or self._killed:
            return counted
        return await jetsam.killed_within(self.pid, self.create_time_s, JETSAM_WAIT_S) or None

    async def _ended(self) -> None:
        """Wait for the leader. Follow its control group meanwhile: it can't be read after its death."""
        ended = asyncio.ensure_future(_readable(_pidfd(self.pid), self._process))
        interval_s = POLL_S
        try:
            while not (await asyncio.wait({ended}, timeout=interval_s))[0]:
                self._oom_kills.follow()
                interval_s = min(2 * interval_s, FOLLOW_INTERVAL_S)
            await ended
        finally:
            ended.cancel()


def _create_time_s(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, OSError):  # then only the token identifies an orphan
        return 0.0


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # macOS, old kernels
        return None


async def _readable(pidfd: int | None, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended: by its pidfd where there is one, else by polling."""
    if pidfd is None:
        while process.poll() is None:
            await asyncio.sleep(POLL_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
