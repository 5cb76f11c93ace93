"""One supervisor around the machine, as `daemon/run.py` and `daemon/daemon.py` are in reality."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.simulation.checks.watch import AUTOSTART
from tests.simulation.world.faults import MACHINE_MIB
from tests.simulation.world.worker import SimulatedWorker

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.core.policy import MIB

if TYPE_CHECKING:
    from tests.simulation.world.journal import OpenGeneration
    from tests.simulation.world.world import World

LATE_S = 1.0
"""A deadline noticed this late was missed in sleep: then pending events come first, once, for as long."""
IDLE_SAMPLE_S = 2.0
PAUSE_S = 3.0
SILENCE_S = 5.0
UNKILLABLE_S = 5.0
SAMPLER_SPELL_S = 15.0
BLOCKED_S = 200.0
"""At most so long another process holds the run's folder."""
FIRST_POLL_S, POLL_S = 0.05, 1.0


class SimulatedSupervisor:
    """Handles events one at a time, in order; a failed action becomes a later event."""

    def __init__(self, world: World) -> None:
        self.world, self.journal = world, world.journal
        history = (
            RunHistory() if world.journal.history is None else RunHistory.restore(json.loads(world.journal.history))
        )
        history.generation = max(history.generation, world.journal.newest)
        self.machine = world.machine_type(world.policy, history, world.number)
        world.watch.note_arrows(self.machine)
        self.alive = True
        self.recovering = self.hurried = self.suspending = False
        self.child: SimulatedWorker | None = None
        self._blocked: ac.Spawn | None = None
        self.forgives = world.happens(world.forgives)
        self._events: deque[ev.Event] = deque()
        self._working = False
        self._busy_s = self._catch_up_s = 0.0
        self._forgiven_s: float | None = None
        self._heard_s = 0.0
        self._waiting = False

    # ---- start and end

    def begin(self) -> None:
        """Recover from the crash of a supervisor, then resume the run if it was running."""
        orphans = self.journal.open()
        if not orphans:
            self._resume()
            return
        self.recovering = True
        restart = self.world.policy.restart
        self._end_orphans(orphans, self.world.clock.now_s + restart.stop_grace_s + restart.term_grace_s)

    def _end_orphans(self, orphans: list[OpenGeneration], deadline_s: float) -> None:
        if not self.alive:
            return
        world, now_s = self.world, self.world.clock.now_s
        if world.workers:
            if self.hurried or now_s >= deadline_s:
                for worker in world.workers:
                    worker.signal(9)
            if self.hurried and now_s >= deadline_s + UNKILLABLE_S:
                # the wait for an unkillable process was cut short: starts are blocked
                self.machine.survivor = world.workers[0].generation
                self.recovering = self.hurried = False
                self._resume()
            world.clock.later(POLL_S, self._end_orphans, orphans, deadline_s)
            return
        newest = max(orphans, key=lambda left: left.generation)
        for left in orphans:
            if left is not newest:
                self.journal.close(left.generation)
        world.watch.recovered_generation(newest)
        waited_for = self.recovering
        self.recovering = self.hurried = False
        self.post(newest.recovered(now_s, world.host.boot))
        if self.alive and waited_for:
            self._resume()

    def _resume(self) -> None:
        if self.machine.state in AT_REST and self.machine.history.unfinished:
            self.command(ev.CommandKind.START, AUTOSTART)

    def die(self) -> None:
        """Pending events are lost; the worker notices."""
        self.alive = False
        self._events.clear()
        self.journal.lose(self.world.chance.random() < 0.5, self.world.chance.randrange(4))
        if self.child is not None:
            self.child.orphaned()

    # ---- commands

    def command(self, kind: ev.CommandKind, reason: str = "by hand") -> None:
        """During recovery only KILL has an effect: it ends the wait."""
        if self.recovering:
            self.hurried |= kind is ev.CommandKind.KILL
        else:
            if self.machine.state in AT_REST:
                self._poll_memory()
            if not self.alive:  # killed at that event
                return
            self.post(ev.Command(self.world.clock.now_s, kind, reason))

    def suspend(self) -> None:
        """The daemon shuts down; another one resumes."""
        self.suspending = True
        if not self.recovering and self.machine.state not in AT_REST and not self.machine.stopping:
            self.command(ev.CommandKind.SUSPEND)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self.suspending and self.alive and not self.recovering and self.machine.state in AT_REST:
            self.journal.commit()
            self.world.supervisor_ends()

    # ---- events

    def stall(self, seconds: float) -> None:
        """Be stuck: no event and no deadline is handled for a while."""
        self._busy_s = self.world.clock.now_s + seconds
        if seconds > PAUSE_S:
            self.world.clock.later(seconds, self._awake, seconds)

    def _awake(self, seconds: float) -> None:
        if self.alive:
            self.post(ev.Paused(self.world.clock.now_s, seconds))

    def receive(self, event: ev.Event) -> None:
        """From a source. Late events get the time of their reading, except samples."""
        now_s = self.world.clock.now_s
        if not self.alive:
            return
        if now_s < self._busy_s:
            self.world.clock.later(self._busy_s - now_s + 0.01 * self.world.chance.random(), self.receive, event)
            return
        if now_s - event.at_s > LATE_S and not isinstance(event, ev.Sample):
            event = replace(event, at_s=now_s)
        self.post(event)

    def post(self, event: ev.Event) -> None:
        """Give the machine an event and perform its actions."""
        self._events.append(event)
        if self._working:
            return
        self._working = True
        while self._events:
            self._deal_with(self._events.popleft())
        self._working = False
        if self.alive:
            self._leave_if_done()

    def _deal_with(self, event: ev.Event) -> None:
        world = self.world
        actions = world.watch.apply(self, event)
        trouble = world.trouble_now()
        cut = world.chance.randrange(len(actions) + 1) if trouble else len(actions)
        for action in actions[:cut]:
            self._do(action)
            if not self.alive:
                return
        if trouble:
            half_spawned = actions[cut] if cut < len(actions) else None
            if isinstance(half_spawned, ac.Spawn):
                self._open(half_spawned)
            world.strike(trouble)
            return
        if type(event) is ev.StepReport and event.generation == self.machine.history.generation:
            left = self.journal.generations.get(event.generation)
            if left is not None:
                left.note(event)
        if not self._waiting and self.machine.state is State.WAITING:
            self._waiting = True
            world.clock.later(FIRST_POLL_S, self._poll_while_waiting, 2 * FIRST_POLL_S)

    # ---- deadlines

    @property
    def tick_s(self) -> float:
        """When the next deadline will be noticed; infinity without one."""
        deadline_s = self.machine.next_deadline() if self.alive else None
        return float("inf") if deadline_s is None else max(deadline_s, self._busy_s, self._catch_up_s)

    def tick(self) -> None:
        """A deadline is noticed."""
        now_s, deadline_s = self.world.clock.now_s, self.machine.next_deadline()
        assert deadline_s is not None
        if self.forgives and now_s - max(deadline_s, self._catch_up_s) > LATE_S and deadline_s != self._forgiven_s:
            self._forgiven_s, self._catch_up_s = deadline_s, now_s + LATE_S
            return
        if self.machine.state is State.BACKOFF:
            self._poll_memory()
        if self.alive:
            self.post(ev.Tick(now_s))

    # ---- actions

    def _do(self, action: ac.Action) -> None:
        match action:
            case ac.Notice() | ac.DumpStacks():
                return
            case ac.Spawn():
                self._spawn(action)
            case ac.SaveHistory():
                self._save(action)
            case ac.CloseGeneration():
                if not action.alive and not self._journal_fails("CloseGeneration"):
                    self.journal.close(action.generation)
            case ac.Finish():
                self._journal_fails("Finish")
            case ac.Terminate() | ac.Kill():
                if self.child is not None:
                    self.child.signal(9 if isinstance(action, ac.Kill) else 15)
                elif self._blocked is not None:
                    self._blocked = None
                    self._events.append(ev.Exited(self.world.clock.now_s, action.generation, None, None))
            case _:
                self._request(action)

    def _journal_fails(self, name: str) -> bool:
        if fails := self.world.happens(self.world.faults.journal_fails):
            self._failed(name, "database is locked")
        return fails

    def _failed(self, name: str, error: str, passing: bool = True) -> None:
        self._events.append(ev.ActionFailed(self.world.clock.now_s, name, error, passing))

    def _save(self, action: ac.SaveHistory) -> None:
        world = self.world
        if not action.wait:
            if self.journal.save_later(action.snapshot, world.watch.shadow.copy()):
                world.clock.later(0.1 * world.chance.random(), self._commit)
        elif not self._journal_fails("SaveHistory"):
            self.journal.save(action.snapshot, world.watch.shadow.copy())

    def _commit(self) -> None:
        if self.alive:
            self.journal.commit()

    def _request(self, action: ac.Action) -> None:
        world, worker = self.world, self.child
        if worker is None or not worker.alive or world.happens(world.faults.request_fails):
            self._failed(type(action).__name__, "the worker is not connected", passing=False)
        elif world.happens(world.faults.lost):
            return
        elif isinstance(action, ac.RequestStop):
            worker.stop(action.waits)
        elif isinstance(action, ac.RequestClearCache):
            worker.clear()
        elif isinstance(action, ac.RequestAutopsy):
            worker.autopsy()
        else:
            assert isinstance(action, ac.RequestResize), f"unknown action {action}"
            worker.resize(action.batch_size, action.effective_batch)

    def _open(self, action: ac.Spawn) -> None:
        self.world.watch.opened(action.generation)
        self.journal.begin(action.generation, self.world.host.boot, self.world.clock.now_s, action.batch_size)

    def _spawn(self, action: ac.Spawn) -> None:
        """Start a worker; at times another process holds the run's folder for a while."""
        world = self.world
        if not world.happens(world.faults.start_blocked):
            self._start(action)
            return
        self._blocked = action
        for lasting in (False, True)[: world.chance.choice((1, 1, 2))]:
            self._events.append(
                ev.StartBlocked(world.clock.now_s, action.generation, "another process holds it", lasting)
            )
        world.clock.later(world.chance.uniform(0.0, BLOCKED_S), self._unblocked, action)

    def _unblocked(self, action: ac.Spawn) -> None:
        if self.alive and self._blocked is action:
            self._blocked = None
            self._start(action)
            self.post(self._events.popleft())

    def _start(self, action: ac.Spawn) -> None:
        world, faults = self.world, self.world.faults
        self._open(action)
        if world.happens(faults.spawn_fails_for_good):
            self._failed("spawn", "[Errno 2] No such file or directory", passing=False)
        elif world.happens(faults.spawn_fails):
            self._failed("spawn", "[Errno 11] Resource temporarily unavailable")
        else:
            world.watch.spawned(action)
            self.child = SimulatedWorker(world, self, action, action.effective_batch)
            world.workers.append(self.child)
            self._events.append(ev.Spawned(world.clock.now_s, action.generation, 7))
            self._heard_s = world.clock.now_s
            world.clock.later(world.sample_s, self._sample, self.child)

    def exited(self, worker: SimulatedWorker) -> None:
        """The worker was reaped, and its process group is empty."""
        if not self.alive or self.child is not worker:
            return
        self.child = None
        death = worker.death
        assert death is not None
        self.world.last_dead = worker
        self._poll_memory()
        self.receive(
            ev.Exited(
                self.world.clock.now_s,
                worker.generation,
                death.exit_code,
                death.signal,
                death.stderr_tail,
                death.oom_killed,
                self.world.host.disk.newest,
                *worker.trained,
            )
        )

    # ---- memory

    def _sample(self, worker: SimulatedWorker) -> None:
        if not self.alive or self.child is not worker or not worker.alive:
            return
        world, faults, now_s = self.world, self.world.faults, self.world.clock.now_s
        interval_s = IDLE_SAMPLE_S if worker.hung or not worker.ready or worker.leaving else world.sample_s
        if now_s < self._busy_s:
            pass
        elif faults.blind_spell and world.happens(faults.blind_spell):
            interval_s = SAMPLER_SPELL_S * world.chance.random()
            self._missed(worker, interval_s)
        elif faults.missing and world.happens(faults.missing):
            self.post(ev.SampleMissing(now_s, worker.generation, "busy"))
        else:
            footprint_mib = worker.mib()
            available = int(world.host.available_mib(footprint_mib) * MIB)
            sample = ev.Sample(now_s, worker.generation, int(footprint_mib * MIB), available, 1)
            if faults.late_sample and world.happens(faults.late_sample):
                world.clock.later(world.chance.uniform(0, 4), self.receive, sample)
            else:
                self.post(sample)
            self._sample_device(worker, int(footprint_mib * MIB))
        world.clock.later(interval_s, self._sample, worker)

    def _sample_device(self, worker: SimulatedWorker, used_bytes: int) -> None:
        """The driver is read only now and then, and may not know the process."""
        total_bytes, now_s = MACHINE_MIB * MIB, self.world.clock.now_s
        if self.world.on_device and worker.alive and self.child is worker and worker.step % 3 == 0:
            used, free = used_bytes if worker.step % 2 else None, max(total_bytes - used_bytes, 0)
            self.post(ev.DeviceSample(now_s, worker.generation, used, free, total_bytes))

    def _missed(self, worker: SimulatedWorker, spell_s: float) -> None:
        """The sampler is stuck: each second of its silence is reported."""
        seconds = SILENCE_S
        while seconds < spell_s:
            missing = ev.SampleMissing(self.world.clock.now_s + seconds, worker.generation, "silent")
            self.world.clock.later(seconds, self._deliver_missed, worker, missing)
            seconds += 1.0

    def _deliver_missed(self, worker: SimulatedWorker, missing: ev.SampleMissing) -> None:
        if self.child is worker and worker.alive:
            self.receive(missing)

    def _poll_memory(self) -> None:
        """Read the machine's memory, for a run without a worker."""
        available = int(self.world.host.available_mib(0.0) * MIB)
        free = available if self.world.on_device else None
        self.post(ev.MachineSample(self.world.clock.now_s, available, self.world.host.pressure, free))

    def _poll_while_waiting(self, interval_s: float) -> None:
        self._waiting = self.alive and self.machine.state is State.WAITING
        if self._waiting:
            if self.world.clock.now_s >= self._busy_s:
                self._poll_memory()
            self.world.clock.later(interval_s, self._poll_while_waiting, min(2 * interval_s, POLL_S))
