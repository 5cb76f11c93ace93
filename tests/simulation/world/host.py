"""The computer: its memory, its disk, its kernel's clock of boots. All of it outlives worker and supervisor."""

from dataclasses import dataclass, field
from random import Random

from tests.simulation.world.faults import MACHINE_MIB

from mlx_supervisor.core.events import MemoryPressure


@dataclass
class Disk:
    """Checkpoints. What is `acknowledged` was flushed to the device; `newest` is what a worker would load."""

    acknowledged: int = 0
    newest: int = 0

    def put(self, step: int) -> None:
        """Written and renamed: the next worker finds it, the next boot may not."""
        self.newest = max(self.newest, step)

    def flush(self, step: int) -> None:
        """On the device."""
        self.acknowledged = max(self.acknowledged, step)

    def lose_power(self, chance: Random) -> None:
        """What was not flushed is there, or is not."""
        if chance.random() < 0.5:
            self.newest = self.acknowledged


@dataclass
class Host:
    """The machine's memory in MiB, and which boot this is."""

    boot: int = 1
    others_mib: float = 500.0
    lingering_mib: float = 0.0
    disk: Disk = field(default_factory=Disk)

    @property
    def pressure(self) -> MemoryPressure:
        """As the operating system judges it."""
        free = self.available_mib(0.0)
        if free > 300:
            return MemoryPressure.NORMAL
        return MemoryPressure.WARN if free > 100 else MemoryPressure.CRITICAL

    def available_mib(self, worker_mib: float) -> float:
        """What is left, never less than nothing."""
        return max(MACHINE_MIB - self.others_mib - self.lingering_mib - worker_mib, 0.0)
