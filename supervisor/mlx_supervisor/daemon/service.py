"""A daemon and its control socket, as the command lines run them."""

import asyncio
from collections.abc import Sequence

from mlx_supervisor.control.transport.server import ControlServer
from mlx_supervisor.daemon.control_adapter import DaemonBackend
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.host import sd_notify
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.state_dir import StateDir


class Service:
    """Call `open`, command the daemon's runs or `serve`, call `close`."""

    def __init__(self, settings: Settings, state: StateDir, observers: Sequence[Observer] = ()) -> None:
        self.daemon = Daemon(settings, state, observers)
        self._control = ControlServer(state.control_socket, DaemonBackend(self.daemon))

    async def open(self, forget: Sequence[str] = ()) -> None:
        """Open the daemon and its control socket. Raises what `Daemon.open` raises, and then leaves nothing open."""
        await self.daemon.open(forget, self._control.start)

    async def serve(self) -> None:
        """Run until a shutdown is requested, then suspend the runs; they resume under the next supervisor."""
        daemon = self.daemon
        starting = asyncio.get_running_loop().create_task(daemon.autostart())
        sd_notify.ready()
        await daemon.shutdown_requested.wait()
        if not daemon.restart_requested:  # after STOPPING=1, a service manager would also end the replacement
            sd_notify.stopping()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await daemon.suspend()

    async def close(self) -> None:
        """Close the control socket and the daemon. Workers must have ended."""
        await self._control.close()
        await self.daemon.close()
