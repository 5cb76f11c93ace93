"""A world for one run: a computer, a worker with faults, people, and a supervisor that can be killed at any event.

Everything random comes from the one generator given, so a seed replays a world exactly.
"""

from __future__ import annotations

from random import Random

from tests.simulation.checks.invariant import check
from tests.simulation.checks.watch import Watch
from tests.simulation.world.channel import Channel
from tests.simulation.world.clock import Clock
from tests.simulation.world.faults import DEATHS, Faults, benign, drawn_faults, drawn_policy
from tests.simulation.world.host import Host
from tests.simulation.world.journal import Journal
from tests.simulation.world.machine import Machine
from tests.simulation.world.shell import Shell
from tests.simulation.world.weather import Weather
from tests.simulation.world.worker import Worker

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.states import AT_REST
from mlx_supervisor.core.policy import RunPolicy

HEALING_EVENTS = 6_000
"""More than any run needs to come to its end in a world that is well again."""
RESTS_IN_HEALTH = 3
"""How often such a run may stand still, for what happened before. Not counted: while a start is refused for a process
that could not be killed, of whose end a supervisor that was stuck hears late."""
TURNS_AT_MOST = 20_000
"""Happenings in the world, none of which tells the machine anything."""


class World:
    """`play` goes on for so many troubled events, then lets the world be well and the run come to its end.

    `forgives`: share of supervisors that hear first what came while they slept over a deadline, as the real one does.
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
        machine_type: type[Machine] = Machine,
    ) -> None:
        self.chance = chance
        self.faults = faults or drawn_faults(chance)
        self.policy = policy or drawn_policy(chance)
        self.target_steps = target_steps or chance.choice((40, 120, 300))
        self.sample_s, self.forgives = sample_s, forgives
        self.number = chance.randrange(2**32)
        self.kernel_tells = chance.random() < 0.5
        self.can_checkpoint_gradients = chance.random() < 0.7
        self.machine_type = machine_type
        self.clock, self.host, self.journal = Clock(), Host(), Journal()
        self.channel = Channel(self)
        self.workers: list[Worker] = []
        self.watch = Watch(self)
        self.weather = Weather(self)
        self.well = False
        self.completed = False
        self.last_dead: Worker | None = None
        self._rested = False
        self._rests_in_health = self._turns = self._turn_events = 0
        self._fix_shares()
        self.shell = Shell(self)

    # ---- the loop

    def play(self, events: int) -> World:
        """To the run's completion, at the earliest when it completes, at the latest some time after `events`."""
        self.weather.begin()
        self.shell.begin()
        self.command(ev.CommandKind.START)
        while not self.completed:
            if self.watch.events >= events and not self.well:
                self.heal()
            self._next()
        self.watch.at_end()
        return self

    def _next(self) -> None:
        self._count_turn()
        if self.shell.machine.state not in AT_REST or not self.shell.alive:
            self._rested = False
        elif self._at_rest():
            return
        tick_s = self.shell.tick_s
        if self.clock.next_s <= tick_s:
            check(self.clock.next_s < float("inf"), "liveness", lambda: self.watch.stuck())
            self.clock.step()
        else:
            self.clock.now_s = max(self.clock.now_s, tick_s)
            self.shell.tick()

    def _count_turn(self) -> None:
        if self._turn_events != self.watch.events:
            self._turn_events, self._turns = self.watch.events, 0
        self._turns += 1
        check(self._turns <= TURNS_AT_MOST, "liveness", lambda: self.watch.stuck())

    def heal(self) -> None:
        """From now on nothing goes wrong any more, and somebody wants the run to end."""
        self.well = True
        self.note("the world is well from now on")
        self.faults = benign(self.faults)
        self._fix_shares()
        self.weather.clear_up()
        for worker in self.workers:
            worker.heal()
        self.watch.begins_to_heal(HEALING_EVENTS)

    def _at_rest(self) -> bool:
        """A person looks at it after a while. True when something has happened already."""
        if self.shell.machine.history.outcome == "completed":
            self.completed = self.well or self.chance.random() < 0.8
            if not self.completed:  # somebody starts it once more
                self.command(ev.CommandKind.START)
            return True
        if not self._rested:
            self._rested = True
            self.clock.later(self.chance.uniform(1, 60), self._look_after)
        return False

    def _look_after(self) -> None:
        self._rested = False
        if self.shell.alive and self.shell.machine.state in AT_REST:
            self._rests_in_health += self.well and self.shell.machine.survivor is None
            check(self._rests_in_health <= RESTS_IN_HEALTH, "liveness", lambda: self.watch.stuck())
            if not self.well and self.shell.machine.history.outcome == "failed" and self.chance.random() < 0.5:
                self.heal()
            self.command(ev.CommandKind.START)

    def note(self, text: str) -> None:
        """For a timeline, if one is kept."""
        if self.watch.timeline is not None:
            self.watch.timeline.say(text)

    # ---- chances

    def often(self, share: float) -> bool:
        """Whether it happens this time."""
        return share > 0 and self.chance.random() < share

    def _fix_shares(self) -> None:
        self.death_share = self.faults.death
        self._kinds = [(name, getattr(self.faults, name)) for name in DEATHS if getattr(self.faults, name)]

    def drawn_death(self) -> str:
        """One of this world's."""
        return self.chance.choices([name for name, _ in self._kinds], [share for _, share in self._kinds])[0]

    def trouble_now(self) -> str:
        """Whether the supervisor, or the machine under it, dies of the event in hand."""
        faults = self.faults
        if faults.supervisor_dies and self.chance.random() < faults.supervisor_dies:
            return "death"
        return "reboot" if faults.reboots and self.chance.random() < faults.reboots else ""

    # ---- what comes from outside

    def deliver(self, event: ev.Event) -> None:
        """A frame arrives at whoever is the supervisor now."""
        self.shell.receive(event)

    def command(self, kind: ev.CommandKind) -> None:
        """A person's wish, if anybody is there to hear it."""
        if not self.shell.alive:
            return
        if kind is ev.CommandKind.SUSPEND:
            self.shell.suspend()
        else:
            self.shell.command(kind, self.chance.choice(("", "by hand")))

    def gone(self, worker: Worker) -> None:
        """The kernel has ended a process; its parent is told a little later."""
        self.workers.remove(worker)
        if worker.death is not None:
            self.note(f"the worker of generation {worker.generation} is gone: {worker.death.kind}")
        self.weather.freed(worker.mib())
        self.clock.later(0.5 * self.chance.random(), worker.parent.exited, worker)

    # ---- supervisors come and go

    def strike(self, trouble: str) -> None:
        """The supervisor is killed, or the machine restarts."""
        if trouble == "reboot":
            for worker in self.workers:
                worker.lose_power()
            self.workers.clear()
            self.note("the machine restarts")
            self.watch.tally.reboots += 1
            self.host.disk.lose_power(self.chance)
            self.weather.reboot()
        self.supervisor_ends(killed=True)
        if trouble == "reboot":
            self.clock.jump(self.chance.uniform(5, 60))

    def supervisor_ends(self, killed: bool = False) -> None:
        """Another one is started by the system after a while."""
        self.note("the supervisor is killed" if killed else "the supervisor ends")
        if killed:
            self.shell.die()
        self.shell.alive = False
        self.clock.later(self.chance.uniform(0.1, 12), self._supervisor_begins)

    def _supervisor_begins(self) -> None:
        self.watch.supervisor_died()
        self.shell = Shell(self)
        self.watch.restored(self.shell.machine)
        self.shell.begin()
