"""A world for one run, from a seed: a worker with faults, a kernel, lost telemetry, a person, and a virtual clock.

`World.run()` plays a run to its end and checks on the way what must always hold. Nothing here waits: a run of days
takes milliseconds. Everything random comes from one generator, so a seed replays a run exactly.
"""

import heapq
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine import RunMachine
from mlx_supervisor.core.policy import MIB, BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy
from mlx_supervisor.core.table import AT_REST

LIMIT_MIB = 2200
SAMPLE_S = 0.25
EVENTS_AT_MOST = 400_000
"""More than any run here needs: a run that never ends fails instead."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong in this world. Shares are chances per step, memory is in MiB."""

    leak_mib: float = 0.0
    base_mib: float = 300.0
    per_sample_mib: float = 60.0
    noise_mib: float = 5.0
    spike: float = 0.0
    crash: float = 0.0
    killed: float = 0.0
    hang: float = 0.0
    exit_0: float = 0.0
    ignores_stop: bool = False
    ignores_term: bool = False
    lost: float = 0.0
    missing: float = 0.0
    supervisor_dies: float = 0.0
    checkpoint_fails: float = 0.0
    refuses: bool = False

    @property
    def survivable(self) -> bool:
        """Whether the run must come to its end."""
        fits = self.base_mib + self.per_sample_mib + 10 * self.leak_mib < 0.8 * LIMIT_MIB
        return fits and not self.refuses

    @classmethod
    def drawn(cls, chance: random.Random) -> "Faults":
        """About two kinds of trouble at a time."""
        kinds: list[dict[str, float | bool]] = [
            {},
            {"leak_mib": chance.choice([2.0, 20.0, 50.0, 100.0])},
            {"per_sample_mib": chance.choice([150.0, 300.0, 900.0])},
            {"noise_mib": 30.0, "spike": 0.003},
            {"crash": 0.004},
            {"killed": 0.004},
            {"hang": 0.002},
            {"exit_0": 0.002},
            {"ignores_stop": True, "leak_mib": 30.0},
            {"ignores_term": True, "hang": 0.002},
            {"lost": 0.2},
            {"missing": 0.05},
            {"supervisor_dies": 0.0005},
            {"checkpoint_fails": 0.3},
            {"base_mib": 2400.0},
            {"refuses": True},
        ]
        chosen: dict[str, float | bool] = {}
        for kind in chance.sample(kinds[:-2], 2) + ([chance.choice(kinds[-2:])] if chance.random() < 0.05 else []):
            chosen |= kind
        return cls(**chosen)  # type: ignore[arg-type]


@dataclass
class Disk:
    """What outlives worker and supervisor."""

    durable_step: int = 0
    snapshot: str = "{}"


@dataclass(eq=False)
class Worker:
    """One process. It trains, saves, leaks, and dies in its own ways."""

    generation: int
    batch: int
    effective: int
    save_every: int
    step: int
    alive: bool = True
    ready: bool = False
    hung: bool = False
    stopping: bool = False
    leaked_mib: float = 0.0
    spike_mib: float = 0.0
    first_step: int = 0


@dataclass
class World:
    """One run from its start to its rest."""

    seed: int
    target_steps: int = 400
    faults: Faults | None = None
    now_s: float = 1000.0
    spawns: int = 0
    barren_spawns: int = 0
    disk: Disk = field(default_factory=Disk)
    finished: ac.Finish | None = None

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.faults = self.faults or Faults.drawn(self.chance)
        self.policy = RunPolicy(
            MemoryPolicy(LIMIT_MIB * MIB, missing_samples=8),
            BatchPolicy(8, grow_after_steps=self.chance.choice([40, 200])),
            RestartPolicy(max_without_progress=6, hang_timeout_s=30.0, close_after_steps=20),
        )
        self.machine = RunMachine(self.policy)
        self.worker: Worker | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._durable_at_spawn = 0
        self._asked_for: set[int] = set()

    # ---- the loop

    def run(self) -> "World":
        """Until the run rests."""
        self._apply(ev.Command(self.now_s, ev.CommandKind.START))
        for _ in range(EVENTS_AT_MOST):
            if self.machine.state in AT_REST:
                self._check_end()
                return self
            self._next()
        raise AssertionError(f"seed {self.seed}: no end after {EVENTS_AT_MOST} events, in {self.machine.state}")

    def _next(self) -> None:
        deadline_s = self.machine.next_deadline()
        if self._queue and (deadline_s is None or self._queue[0][0] <= deadline_s):
            self.now_s, _, happen = heapq.heappop(self._queue)
            happen()
            return
        assert deadline_s is not None, f"seed {self.seed}: nothing will ever happen again in {self.machine.state}"
        self.now_s = max(self.now_s, deadline_s)
        self._apply(ev.Tick(self.now_s))

    def _later(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, happen))

    def _often(self, share: float) -> bool:
        return share > 0 and self.chance.random() < share

    # ---- the supervisor

    def _apply(self, event: ev.Event) -> None:
        for action in self.machine.apply(event):
            self._do(action)

    def _do(self, action: ac.Action) -> None:
        match action:
            case ac.SaveHistory():
                self.disk.snapshot = json.dumps(action.snapshot)
            case ac.Spawn():
                self._spawn(action)
            case ac.Finish():
                self.finished = action
            case ac.Kill():
                self._signal(action.generation, 9)
            case ac.Terminate():
                self._signal(action.generation, 15)
            case ac.RequestStop():
                self._tell(action.generation, self._stop)
            case ac.RequestClearCache():
                self._tell(action.generation, self._clear)
            case ac.RequestResize():
                self._tell(action.generation, lambda worker: setattr(worker, "batch", action.batch_size))

    def _supervisor_dies(self) -> None:
        """And with it the worker; another one takes over from what is on the disk."""
        if self.worker is not None:
            self.worker.alive, self.worker = False, None
        self.machine = RunMachine(self.policy, RunHistory.restore(json.loads(self.disk.snapshot)))
        self._apply(ev.Recovered(self.now_s, self.machine.history.generation, False, 0))
        if self.machine.history.wanted:
            self._apply(ev.Command(self.now_s, ev.CommandKind.START))

    # ---- a process

    def _spawn(self, spawn: ac.Spawn) -> None:
        assert self.worker is None, f"seed {self.seed}: two workers"
        assert json.loads(self.disk.snapshot)["generation"] == spawn.generation
        assert spawn.batch_size is not None
        assert spawn.effective_batch == 8
        assert 1 <= spawn.batch_size <= 8
        self.spawns += 1
        self.barren_spawns = 0 if self.disk.durable_step > self._durable_at_spawn else self.barren_spawns + 1
        self._durable_at_spawn = self.disk.durable_step
        assert self.barren_spawns <= 6 + 4, f"seed {self.seed}: {self.barren_spawns} starts without progress"
        every = spawn.checkpoint_every_steps or 25
        worker = Worker(spawn.generation, spawn.batch_size, 8, every, self.disk.durable_step)
        worker.first_step = worker.step
        self.worker = worker
        self._report(worker, ev.Spawned(self.now_s, worker.generation, 7), sure=True)
        self._later(self.chance.uniform(1, 5), lambda: self._ready(worker))
        self._later(SAMPLE_S, lambda: self._sample(worker))

    def _ready(self, worker: Worker) -> None:
        if not worker.alive:
            return
        if self.faults and self.faults.refuses:
            self._report(worker, ev.Bye(self.now_s, worker.generation, ev.Outcome.REFUSED, "no", 0, None, None))
            self._exit(worker, 78)
            return
        worker.ready = True
        words = (worker.step, self.target_steps, worker.batch, worker.effective)
        self._report(worker, ev.Ready(self.now_s, worker.generation, *words))
        self._later(self._step_s(worker), lambda: self._step(worker))

    def _step_s(self, worker: Worker) -> float:
        return self.chance.uniform(0.25, 0.35)

    def _step(self, worker: Worker) -> None:
        assert self.faults is not None
        if not worker.alive:
            return
        if self._often(self.faults.supervisor_dies):
            self._supervisor_dies()
            return
        worker.hung = worker.hung or self._often(self.faults.hang)
        if worker.hung:
            return
        if worker.step >= self.target_steps or (worker.stopping and not self.faults.ignores_stop):
            self._leave(worker)
            return
        worker.step += 1
        worker.leaked_mib += self.faults.leak_mib
        worker.spike_mib = self.chance.uniform(0, 900) if self._often(self.faults.spike) else 0.0
        memory = (int(self._mib(worker) * MIB), 0, 0, 0)
        words = (worker.step, 1.0, 9, 8, 1e-3, 0.3, worker.batch, worker.effective // worker.batch)
        self._report(worker, ev.StepReport(self.now_s, worker.generation, *words, *memory))
        if (worker.step - worker.first_step) % worker.save_every == 0:
            self._save(worker)
        if self._dies(worker):
            return
        self._later(self._step_s(worker), lambda: self._step(worker))

    def _dies(self, worker: Worker) -> bool:
        assert self.faults is not None
        if self._often(self.faults.crash):
            self._exit(worker, 1, tail="ValueError: bad luck")
        elif self._often(self.faults.killed):
            self._exit(worker, None, 9)
        elif self._often(self.faults.exit_0):
            self._exit(worker, 0)
        return not worker.alive

    def _save(self, worker: Worker) -> None:
        assert self.faults is not None
        ok = not self._often(self.faults.checkpoint_fails)
        if ok:
            self.disk.durable_step = max(self.disk.durable_step, worker.step)
        words = (worker.step, ok, 0.2, 0.1, 5 * MIB, "" if ok else "disk full")
        self._report(worker, ev.CheckpointReport(self.now_s, worker.generation, *words))

    def _leave(self, worker: Worker) -> None:
        self._save(worker)
        done = worker.step >= self.target_steps and self.disk.durable_step >= self.target_steps
        outcome = ev.Outcome.COMPLETED if done else ev.Outcome.STOPPED
        self._report(worker, ev.Bye(self.now_s, worker.generation, outcome, "", worker.step, 1.0, None))
        self._exit(worker, 0 if done else 75)

    def _exit(self, worker: Worker, code: int | None, signal: int | None = None, tail: str = "") -> None:
        if not worker.alive:
            return
        worker.alive = False
        delay_s = self.chance.uniform(0, 0.5)
        event = ev.Exited(self.now_s + delay_s, worker.generation, code, signal, tail, False)
        self._later(delay_s, lambda: self._reap(worker, event))

    def _reap(self, worker: Worker, event: ev.Exited) -> None:
        if self.worker is worker:
            self.worker = None
        self._apply(event)

    # ---- between the two

    def _report(self, worker: Worker, event: ev.Event, sure: bool = False) -> None:
        """Telemetry: late, or lost."""
        assert self.faults is not None
        if sure or not self._often(self.faults.lost):
            self._later(self.chance.uniform(0, 0.01), lambda: self._apply(event))

    def _tell(self, generation: int, do: Callable[[Worker], object]) -> None:
        worker = self.worker
        assert worker is not None, f"seed {self.seed}: an order for nobody"
        assert worker.generation == generation
        if self.faults and not self._often(self.faults.lost):
            do(worker)

    def _stop(self, worker: Worker) -> None:
        worker.stopping = True

    def _clear(self, worker: Worker) -> None:
        if worker.alive and not worker.hung:
            self._report(worker, ev.Cleared(self.now_s, worker.generation, 0, 0))

    def _signal(self, generation: int, number: int) -> None:
        assert self.faults is not None
        worker = self.worker
        assert worker is not None, f"seed {self.seed}: a signal for nobody"
        assert worker.generation == generation
        if number == 15 and (self.faults.ignores_term or worker.hung):
            return
        if number == 15 and worker.ready and worker.alive:
            self._leave(worker)
        else:
            self._exit(worker, None, number)

    def _mib(self, worker: Worker) -> float:
        assert self.faults is not None
        noise = self.chance.gauss(0, self.faults.noise_mib)
        held = self.faults.base_mib + (self.faults.per_sample_mib * worker.batch if worker.ready else 0)
        return max(held + worker.leaked_mib + worker.spike_mib + noise, 1.0)

    def _sample(self, worker: Worker) -> None:
        assert self.faults is not None
        if not worker.alive:
            return
        if self._often(self.faults.missing):
            self._apply(ev.SampleMissing(self.now_s, worker.generation, "busy"))
        else:
            self._apply(ev.Sample(self.now_s, worker.generation, int(self._mib(worker) * MIB), 2**40, 1))
        self._later(SAMPLE_S, lambda: self._sample(worker))

    # ---- what must hold

    def _check_end(self) -> None:
        assert self.faults is not None
        past, finish = self.machine.history, self.finished
        context = f"seed {self.seed}, {self.faults}: {past}"
        assert finish is not None, context
        assert finish.reason, context
        assert past.durable_step <= self.disk.durable_step, f"believes in a checkpoint that is not there: {context}"
        if finish.outcome == "completed":
            assert self.disk.durable_step == self.target_steps, f"not done: {context}"
        if self.faults.survivable:
            assert finish.outcome == "completed", f"gave up: {finish.reason}; {context}"
        if self.faults.refuses or self.faults.base_mib > LIMIT_MIB:
            assert finish.outcome == "failed", context
            assert self.spawns <= 2, f"a restart storm: {context}"
