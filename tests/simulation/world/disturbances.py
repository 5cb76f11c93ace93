"""Disturbances of the computer during a run: sleep, stalls, other programs, commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_supervisor.core import events as ev

if TYPE_CHECKING:
    from tests.simulation.world.world import World

SLEEP_S = (2.0, 5_000.0)
STALL_S = (0.5, 60.0)
OTHERS_S = 15.0
COMMANDS = (
    ev.CommandKind.START,
    ev.CommandKind.START,
    ev.CommandKind.STOP,
    ev.CommandKind.RESTART,
    ev.CommandKind.RESTART,
    ev.CommandKind.KILL,
    ev.CommandKind.SUSPEND,
)


class Disturbances:
    """Each kind recurs at random, with a mean time between."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._host = world.host
        self._resting_mib = world.host.others_mib

    def begin(self) -> None:
        """Schedule the first of each kind."""
        faults = self._world.faults
        for kind, mean_s in (
            (self._sleep, faults.sleeps_after_s),
            (self._stall, faults.stalls_after_s),
            (self._command, faults.commands_after_s),
            (self._others, OTHERS_S if faults.others_mib else 0.0),
        ):
            if mean_s:
                self._again(kind, mean_s)

    def clear_up(self) -> None:
        """Free the machine's memory; no disturbances follow."""
        self._host.others_mib = self._resting_mib
        self._host.lingering_mib = 0.0

    def _again(self, kind: Callable[[], None], mean_s: float) -> None:
        self._world.clock.later(self._world.chance.expovariate(1 / mean_s), self._happen, kind, mean_s)

    def _happen(self, kind: Callable[[], None], mean_s: float) -> None:
        if not self._world.healed:
            kind()
            self._again(kind, mean_s)

    def _sleep(self) -> None:
        world = self._world
        seconds = world.chance.uniform(*SLEEP_S)
        world.note(f"the machine sleeps for {seconds:.0f} s")
        world.clock.jump(world.clock.now_s + seconds, world.chance)

    def _stall(self) -> None:
        if self._world.supervisor.alive:
            seconds = self._world.chance.uniform(*STALL_S)
            self._world.note(f"the supervisor is stuck for {seconds:.0f} s")
            self._world.supervisor.stall(seconds)

    def _command(self) -> None:
        self._world.command(self._world.chance.choice(COMMANDS))

    def _others(self) -> None:
        self._host.others_mib = self._resting_mib + self._world.chance.uniform(0, self._world.faults.others_mib)

    def freed(self, mib: float) -> None:
        """A worker ended. Its memory is freed at once, later, or at the next reboot."""
        lingers_s = self._world.faults.memory_lingers_s
        if lingers_s:
            self._host.lingering_mib += mib
            self._world.clock.later(self._world.chance.uniform(0, lingers_s), self._come_back, self._host.boot, mib)

    def _come_back(self, boot: int, mib: float) -> None:
        if boot == self._host.boot:
            self._host.lingering_mib = max(self._host.lingering_mib - mib, 0.0)

    def reboot(self) -> None:
        """A reboot frees all memory."""
        self._host.boot += 1
        self._host.lingering_mib = 0.0
