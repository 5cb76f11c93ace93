"""A world for one run: a computer, a worker with faults, people, and a supervisor that can be killed at any event.

Everything random comes from the one generator given, so a seed replays a world exactly.
"""

from __future__ import annotations

from random import Random

from tests.simulation.checks.invariant import check
from tests.simulation.checks.watch import Watch
from tests.simulation.world.channel import SimulatedChannel
from tests.simulation.world.clock import SimulatedClock
from tests.simulation.world.disturbances import Disturbances
from tests.simulation.world.faults import DEATHS, Faults, benign, drawn_faults, drawn_policy
from tests.simulation.world.host import SimulatedHost
from tests.simulation.world.journal import SimulatedJournal
from tests.simulation.world.machine import SimulatedRun
from tests.simulation.world.supervisor import SimulatedSupervisor
from tests.simulation.world.worker import SimulatedWorker

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.states import AT_REST
from mlx_supervisor.core.policy import RunPolicy

HEALING_EVENTS = 6_000
"""More than any run needs to complete in a healed world."""
RESTS_WHEN_HEALED = 3
"""How often such a run may come to rest because of earlier faults. Not counted: refused starts beside an unkillable
process, whose end a stuck supervisor learns late."""
TURNS_AT_MOST = 20_000
"""Consecutive turns of the world without an event for the machine."""


class World:
    """`play` runs a number of events with faults, then heals the world and lets the run complete.

    `forgives`: share of supervisors that handle events before a deadline missed in sleep, as the real one does.
    """

    def __init__(
        self,
        chance: Random,
        *,
        faults: Faults | None = None,
        policy: RunPolicy | None = None,
        target_steps: int | None = None,
        sample_s: float = 0.5,
        forgives: float = 0.7,
        machine_type: type[SimulatedRun] = SimulatedRun,
    ) -> None:
        self.chance = chance
        self.faults = faults or drawn_faults(chance)
        self.policy = policy or drawn_policy(chance)
        self.target_steps = target_steps or chance.choice((40, 120, 300))
        self.sample_s, self.forgives = sample_s, forgives
        self.number = chance.randrange(2**32)
        self.on_device = self.number % 4 == 0
        """The arrays are also in the memory of a device, as large as the machine's and under the same limit."""
        self.kernel_tells = chance.random() < 0.5
        self.can_checkpoint_gradients = chance.random() < 0.7
        self.machine_type = machine_type
        self.clock, self.host, self.journal = SimulatedClock(), SimulatedHost(), SimulatedJournal()
        self.channel = SimulatedChannel(self)
        self.workers: list[SimulatedWorker] = []
        self.watch = Watch(self)
        self.disturbances = Disturbances(self)
        self.healed = False
        self.completed = False
        self.last_dead: SimulatedWorker | None = None
        self._rested = False
        self._rests_when_healed = self._turns = self._turn_events = 0
        self._fix_shares()
        self.supervisor = SimulatedSupervisor(self)

    # ---- the loop

    def play(self, events: int) -> World:
        """Play until the run completes, at the latest some time after `events`."""
        self.disturbances.begin()
        self.supervisor.begin()
        self.command(ev.CommandKind.START)
        while not self.completed:
            if self.watch.events >= events and not self.healed:
                self.heal()
            self._next()
        self.watch.at_end()
        return self

    def _next(self) -> None:
        self._count_turn()
        if self.supervisor.machine.state not in AT_REST or not self.supervisor.alive:
            self._rested = False
        elif self._at_rest():
            return
        tick_s = self.supervisor.tick_s
        if self.clock.next_s <= tick_s:
            check(self.clock.next_s < float("inf"), "liveness", lambda: self.watch.stuck())
            self.clock.step()
        else:
            self.clock.now_s = max(self.clock.now_s, tick_s)
            self.supervisor.tick()

    def _count_turn(self) -> None:
        if self._turn_events != self.watch.events:
            self._turn_events, self._turns = self.watch.events, 0
        self._turns += 1
        check(self._turns <= TURNS_AT_MOST, "liveness", lambda: self.watch.stuck())

    def heal(self) -> None:
        """End all faults; the run must complete."""
        self.healed = True
        self.note("the world is healed")
        self.faults = benign(self.faults)
        self._fix_shares()
        self.disturbances.clear_up()
        for worker in self.workers:
            worker.heal()
        self.watch.healing_begins(HEALING_EVENTS)

    def _at_rest(self) -> bool:
        """A person starts the run after a while. True if something happened already."""
        if self.supervisor.machine.history.outcome == "completed":
            self.completed = self.healed or self.chance.random() < 0.8
            if not self.completed:  # a person starts it again
                self.command(ev.CommandKind.START)
            return True
        if not self._rested:
            self._rested = True
            self.clock.later(self.chance.uniform(1, 60), self._start_after_rest)
        return False

    def _start_after_rest(self) -> None:
        self._rested = False
        if self.supervisor.alive and self.supervisor.machine.state in AT_REST:
            self._rests_when_healed += self.healed and self.supervisor.machine.survivor is None
            check(self._rests_when_healed <= RESTS_WHEN_HEALED, "liveness", lambda: self.watch.stuck())
            if not self.healed and self.supervisor.machine.history.outcome == "failed" and self.chance.random() < 0.5:
                self.heal()
            self.command(ev.CommandKind.START)

    def note(self, text: str) -> None:
        """Add to the timeline, if there is one."""
        if self.watch.timeline is not None:
            self.watch.timeline.add_text(text)

    # ---- chances

    def happens(self, share: float) -> bool:
        """Whether an event of this probability happens now."""
        return share > 0 and self.chance.random() < share

    def _fix_shares(self) -> None:
        self.death_share = self.faults.death
        self._kinds = [(name, getattr(self.faults, name)) for name in DEATHS if getattr(self.faults, name)]

    def drawn_death(self) -> str:
        """One of this world's deaths."""
        return self.chance.choices([name for name, _ in self._kinds], [share for _, share in self._kinds])[0]

    def trouble_now(self) -> str:
        """Whether the supervisor dies, or the machine restarts, at the current event."""
        faults = self.faults
        if faults.supervisor_dies and self.chance.random() < faults.supervisor_dies:
            return "death"
        return "reboot" if faults.reboots and self.chance.random() < faults.reboots else ""

    # ---- from outside

    def deliver(self, event: ev.Event) -> None:
        """A frame arrives at the current supervisor."""
        self.supervisor.receive(event)

    def command(self, kind: ev.CommandKind) -> None:
        """A person's request, if a supervisor is running."""
        if not self.supervisor.alive:
            return
        if kind is ev.CommandKind.SUSPEND:
            self.supervisor.suspend()
        else:
            self.supervisor.command(kind, self.chance.choice(("", "by hand")))

    def worker_ended(self, worker: SimulatedWorker) -> None:
        """The kernel ended a process; its parent learns of it a little later."""
        self.workers.remove(worker)
        if worker.death is not None:
            self.note(f"the worker of generation {worker.generation} ended: {worker.death.kind}")
        self.disturbances.freed(worker.mib())
        self.clock.later(0.5 * self.chance.random(), worker.parent.exited, worker)

    # ---- supervisors

    def strike(self, trouble: str) -> None:
        """The supervisor is killed, or the machine restarts."""
        if trouble == "reboot":
            for worker in self.workers:
                worker.lose_power()
            self.workers.clear()
            self.note("the machine restarts")
            self.watch.tally.reboots += 1
            self.host.disk.lose_power(self.chance)
            self.disturbances.reboot()
        self.supervisor_ends(killed=True)
        if trouble == "reboot":
            self.clock.jump(self.chance.uniform(5, 60))

    def supervisor_ends(self, killed: bool = False) -> None:
        """The system starts another one after a while."""
        self.note("the supervisor is killed" if killed else "the supervisor ends")
        if killed:
            self.supervisor.die()
        self.supervisor.alive = False
        self.clock.later(self.chance.uniform(0.1, 12), self._supervisor_begins)

    def _supervisor_begins(self) -> None:
        self.watch.supervisor_died()
        self.supervisor = SimulatedSupervisor(self)
        self.watch.restored(self.supervisor.machine)
        self.supervisor.begin()
