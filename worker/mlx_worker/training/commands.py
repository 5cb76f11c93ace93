"""The supervisor's commands to a running worker, polled between micro-batches."""

from mlx_supervisor import wire
from mlx_worker.autopsy.handler import AutopsyHandler
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag


class Commands:
    """Answers immediate commands at once, and keeps the others for the end of the current update."""

    def __init__(self, link: Link, stop: StopFlag, memory: CachePolicy) -> None:
        self.link = link
        self.stop = stop
        self.autopsy = AutopsyHandler(link, stop, memory)
        self._memory = memory
        self._resize: wire.Resize | None = None

    def poll(self) -> None:
        """Handle the commands received so far; never waits."""
        for command in self.link.receive():
            match command:
                case wire.ClearCache():
                    counters = self._memory.relieve()
                    self.link.send(wire.Cleared, active_bytes=counters.active_bytes, cache_bytes=counters.cache_bytes)
                case wire.Stop():
                    self.stop.request(command.reason, waits=command.waits)
                case wire.Resize():
                    self._resize = command
                case wire.Autopsy():
                    self.autopsy.request(command)

    def take_resize(self) -> wire.Resize | None:
        """The latest resize that is not yet applied."""
        resize, self._resize = self._resize, None
        return resize
