"""What the supervisor asks of a running worker, looked at between micro-batches."""

from mlx_supervisor import wire
from mlx_worker.autopsy.autopsy import Autopsy
from mlx_worker.memory.cache_policy import Memory
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag


class Commands:
    """Answers what can be answered at once, and keeps the rest for the end of the update in hand."""

    def __init__(self, link: Link, stop: StopFlag, memory: Memory) -> None:
        self.link = link
        self.stop = stop
        self.autopsy = Autopsy(link, stop, memory)
        self._memory = memory
        self._resize: wire.Resize | None = None

    def poll(self) -> None:
        """Handle the commands that have come; never waits."""
        for command in self.link.receive():
            match command:
                case wire.ClearCache():
                    counters = self._memory.relieve()
                    self.link.send(wire.Cleared, active_bytes=counters.active_bytes, cache_bytes=counters.cache_bytes)
                case wire.Stop():
                    self.stop.request(command.reason)
                case wire.Resize():
                    self._resize = command
                case wire.Autopsy():
                    self.autopsy.request(command)

    def take_resize(self) -> wire.Resize | None:
        """The last resize that was asked for and not yet done."""
        resize, self._resize = self._resize, None
        return resize
