"""The computer: memory, disk and boots. All of it survives worker and supervisor."""

from dataclasses import dataclass, field
from random import Random

from tests.simulation.world.faults import MACHINE_MIB

from mlx_supervisor.core.events import MemoryPressure


@dataclass
class SimulatedDisk:
    """Checkpoints. `acknowledged` was flushed to the device; `newest` is what a worker would load."""

    acknowledged: int = 0
    newest: int = 0

    def put(self, step: int) -> None:
        """Written and renamed, but not flushed: it may be lost in a reboot."""
        self.newest = max(self.newest, step)

    def flush(self, step: int) -> None:
        """The checkpoint is on the device."""
        self.acknowledged = max(self.acknowledged, step)

    def lose_power(self, chance: Random) -> None:
        """What was not flushed may be lost."""
        if chance.random() < 0.5:
            self.newest = self.acknowledged


@dataclass
class SimulatedHost:
    """The machine's memory in MiB, and which boot this is."""

    boot: int = 1
    others_mib: float = 500.0
    lingering_mib: float = 0.0
    disk: SimulatedDisk = field(default_factory=SimulatedDisk)

    @property
    def pressure(self) -> MemoryPressure:
        """The memory pressure that the operating system reports."""
        free = self.available_mib(0.0)
        if free > 300:
            return MemoryPressure.NORMAL
        return MemoryPressure.WARN if free > 100 else MemoryPressure.CRITICAL

    def available_mib(self, worker_mib: float) -> float:
        """Available memory, at least 0."""
        return max(MACHINE_MIB - self.others_mib - self.lingering_mib - worker_mib, 0.0)
