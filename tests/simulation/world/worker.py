"""One worker process: it loads, trains, evaluates, saves, leaks, hangs and dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.world.deaths import Death, death_of
from tests.simulation.world.faults import MACHINE_MIB

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.core.policy import MIB

if TYPE_CHECKING:
    from tests.simulation.world.supervisor import SimulatedSupervisor
    from tests.simulation.world.world import World

DEFAULT_BATCH = 4
"""The micro-batch of a worker without a requested one."""
STEP_SHARES = (0.67, 1.33)
"""Of `Faults.step_s`."""
EVALUATION_S = 3.0
GRACE_S = 30.0
"""How long a worker continues after its supervisor died (the default of `Job.grace_s`)."""
RETRY_S = (1.0, 20.0)
"""Between two attempts to save on a full disk."""
UNKILLABLE_DELAY_S = (5.0, 300.0)
"""How late SIGKILL takes effect on a process that hangs in the kernel."""
CHECKPOINTED_SHARE = 0.45
"""Share of a sample's memory that is still needed with gradient checkpointing."""


class SimulatedWorker:
    """Runs until the kernel ends it. Its messages go through the world's channel to its supervisor."""

    def __init__(self, world: World, parent: SimulatedSupervisor, spawn: Spawn, effective: int | None) -> None:
        self.world, self.parent, self.spawn = world, parent, spawn
        self.generation = spawn.generation
        self.batch = DEFAULT_BATCH if world.faults.wrong_batch else spawn.batch_size or DEFAULT_BATCH
        self.effective = effective or self.batch
        self.refused = spawn.batch_size not in (None, self.batch)
        self.gradients_checkpointed = spawn.gradient_checkpointing
        self.save_every = spawn.checkpoint_every_steps or world.faults.save_every
        self.step = self.saved = self.resumed_at = 0
        self.alive = True
        self.ready = self.hung = self.stopping = self.termed = self.leaving = self.writing = False
        self.kill_pending = self.waits = False
        self.unkillable = world.happens(world.faults.unkillable)
        self.death: Death | None = None
        self.leaked_mib = self.cache_mib = self.extra_mib = 0.0
        self._load()

    @property
    def trained(self) -> tuple[int, int]:
        """The first and the last update that it noted on disk; 0 for none."""
        return (self.resumed_at + 1, self.step) if self.step > self.resumed_at else (0, 0)

    # ---- start

    def _load(self) -> None:
        faults, chance = self.world.faults, self.world.chance
        load_s = faults.load_s * chance.uniform(0.3, 1.2)
        self.send(ev.PhaseChange, ev.Phase.LOAD, "model")
        if self.world.on_device:
            self.send(ev.DeviceFound, MACHINE_MIB * MIB, self.world.policy.memory.limit_bytes, "GPU-0")
        self.world.clock.later(load_s, self._loaded)

    def _loaded(self) -> None:
        world = self.world
        if not self.alive or self.hung:
            return
        if world.faults.refuses:
            self.refused = True
            self.send(ev.Bye, ev.Outcome.REFUSED, "no such model", 0, None, None)
            self._die("refused")
        elif world.happens(world.faults.load_dies):
            self._die(world.chance.choice(("crash", "killed", "oom_kill", "exit_0")))
        elif world.faults.never_ready:
            world.clock.later(10.0, self._loaded)
        else:
            self.ready = True
            self.step = self.saved = self.resumed_at = world.host.disk.newest
            world.watch.resumed(self)
            self.send(
                ev.Ready,
                self.step,
                world.target_steps,
                self.batch,
                self.effective,
                f"step-{self.step:09d}" if self.step else None,
                (),
                (),
                self.gradients_checkpointed,
                world.can_checkpoint_gradients,
            )
            world.clock.later(world.chance.uniform(*STEP_SHARES) * world.faults.step_s, self._step)

    # ---- training

    def _step(self) -> None:
        if not self.alive or self.hung or self._leaves():
            return
        world, faults = self.world, self.world.faults
        if self.step >= world.target_steps:
            self._leave()
            return
        if self._ends_at_this_step():
            return
        self.step += 1
        self.leaked_mib += faults.leak_mib
        self.cache_mib += 0.1 * (faults.cache_mib - self.cache_mib)
        self.extra_mib = world.chance.uniform(0, 900) if world.happens(faults.spike) else 0.0
        step_s = world.chance.uniform(*STEP_SHARES) * world.faults.step_s
        self._report(step_s)
        if self.step - self.saved >= self.save_every and not self.writing:
            self._save()
        if world.host.available_mib(self.mib()) <= 0:
            self._die("oom_kill")
        elif faults.evaluate_every and self.step % faults.evaluate_every == 0:
            self._evaluate(faults.evaluation_mib)
        else:
            world.clock.later(step_s, self._step)

    def _report(self, step_s: float) -> None:
        world = self.world
        delay_s = world.channel.delay_s()
        if delay_s is None:
            return
        active, cache = int(self.held_mib() * MIB), int(self.cache_mib * MIB)
        accumulation = max(self.effective // self.batch, 1)
        at_s = world.clock.now_s + delay_s
        words = (self.step, 1.0, 900, self.effective, 1e-3, step_s, self.batch, accumulation)
        own = 0 if world.happens(world.faults.misread) else int((self.held_mib() + self.cache_mib) * MIB)
        device: dict[str, Any] = {}
        if world.on_device:
            limit_bytes, free = world.policy.memory.limit_bytes, int(world.host.available_mib(self.held_mib()) * MIB)
            device = {"device_limit_bytes": limit_bytes, "device_free_bytes": free, "peak_bytes": active}
        report = ev.StepReport(at_s, self.generation, *words, active, cache, process_bytes=own, **device)
        world.channel.send(delay_s, report)

    def _evaluate(self, extra_mib: float) -> None:
        self.extra_mib = extra_mib
        self.send(ev.PhaseChange, ev.Phase.EVAL, "0/10")
        self.world.clock.later(self.world.chance.uniform(0.2, 1.0) * EVALUATION_S, self._evaluated)

    def _evaluated(self) -> None:
        if self.alive and not self.hung and not self._leaves():
            self.extra_mib = 0.0
            self.send(ev.ValidationReport, self.step, 2.0)
            self.send(ev.PhaseChange, ev.Phase.TRAIN)
            self._step()

    # ---- memory, in MiB

    def held_mib(self) -> float:
        """Memory without the cache."""
        faults = self.world.faults
        if not self.ready:
            return faults.base_mib
        each = faults.per_sample_mib * (CHECKPOINTED_SHARE if self.gradients_checkpointed else 1.0)
        return faults.base_mib + each * self.batch + self.leaked_mib

    def mib(self) -> float:
        """The current footprint."""
        noise = self.world.chance.gauss(0.0, self.world.faults.noise_mib)
        return max(self.held_mib() + self.cache_mib + self.extra_mib + noise, 1.0)

    # ---- checkpoints

    def _save(self) -> None:
        self.writing, self.saved = True, self.step
        save_s = self.world.faults.save_s * self.world.chance.uniform(0.3, 1.5)
        self.world.clock.later(save_s, self._written, self.step, save_s)

    def _written(self, step: int, save_s: float) -> None:
        if not self.alive:
            return
        if self.world.happens(self.world.faults.save_fails):
            self._saved(step, save_s, "No space left on device")
        else:
            self.world.host.disk.put(step)
            self.world.clock.later(0.02, self._flushed, step, save_s)

    def _flushed(self, step: int, save_s: float) -> None:
        if self.alive:
            self.world.host.disk.flush(step)
            self._saved(step, save_s, "")

    def _saved(self, step: int, save_s: float, error: str) -> None:
        self.writing = False
        self.send(ev.CheckpointReport, step, not error, save_s, 0.02, 5 * MIB, error)
        if self.leaving:
            self._leave_now(failed=bool(error) and step == self.step)

    # ---- end

    def _leaves(self) -> bool:
        if self.termed or (self.stopping and not self.world.faults.ignores_stop):
            self._leave()
        return self.leaving

    def _leave(self) -> None:
        if not self.leaving:
            self.leaving = True
            if not self.writing:
                self._leave_now()

    def _leave_now(self, failed: bool = False) -> None:
        """Save a last checkpoint, send a last message and exit."""
        disk, done = self.world.host.disk, self.step >= self.world.target_steps
        if not failed and disk.acknowledged < self.step:
            self._save()
        elif failed and self.waits and not self.termed:
            self.send(ev.PhaseChange, ev.Phase.CHECKPOINT, "waiting", "the disk")
            self.world.clock.later(self.world.chance.uniform(*RETRY_S), self._try_again)
        elif failed and done:
            self._die("disk_full")
        else:
            outcome = ev.Outcome.COMPLETED if done else ev.Outcome.STOPPED
            self.send(ev.Bye, outcome, "", self.step, 1.0, "ab" * 32 if done else None)
            self._die("completed" if done else "stopped")

    def _try_again(self) -> None:
        if self.alive and not self.hung:
            self._leave_now(failed=not self.waits or self.termed)

    def _ends_at_this_step(self) -> bool:
        """Whether the worker dies or hangs at this step."""
        world, faults = self.world, self.world.faults
        if self.step + 1 == faults.crash_at_step:
            return self._die("crash")
        if self.step + 1 == faults.not_finite_at_step:
            return self._die("not_finite")
        if not world.happens(world.death_share):
            return False
        kind = world.drawn_death()
        if kind == "hang":
            self.hung = True
            return True
        if kind == "interrupted":
            self.termed = True
            return self._leaves()
        return self._die(kind)

    def _die(self, kind: str) -> bool:
        death = death_of(kind, self.world)
        if death.errors:
            self.send(ev.Bye, ev.Outcome.FAILED, "", self.step, 1.0, None, death.errors)
        self._exit(death)
        return True

    def _exit(self, death: Death) -> None:
        if self.alive:
            self.alive, self.death = False, death
            self.world.worker_ended(self)

    def signal(self, number: int) -> None:
        """A signal: SIGTERM may be ignored, SIGKILL may be late."""
        world, faults = self.world, self.world.faults
        if not self.alive:
            return
        if number == 9:
            delay_s = faults.dies_slowly_s * world.chance.random()
            if self.unkillable:
                delay_s = world.chance.uniform(*UNKILLABLE_DELAY_S)
                self.hung = True
            self.kill_pending = True
            world.clock.later(delay_s, self._exit, Death("ordered", None, 9))
        elif self.hung or faults.ignores_term or self.leaving:
            return
        elif self.ready:
            self.termed = True
        else:
            self._exit(Death("interrupted", None, 15))

    def orphaned(self) -> None:
        """The supervisor died: save and exit, at the latest after the grace period."""
        self.termed = True
        self.world.clock.later(GRACE_S, self._end_itself)

    def _end_itself(self) -> None:
        if self.alive and not self.unkillable:
            self._exit(Death("orphan", None, 9))

    def heal(self) -> None:
        """The kernel can kill it again, and does so if a kill is pending."""
        self.unkillable = False
        if self.kill_pending:
            self._exit(Death("ordered", None, 9))

    def lose_power(self) -> None:
        """End at once, unseen."""
        self.alive = False

    # ---- requests

    def stop(self, waits: bool) -> None:
        """Save and exit; `waits` for the disk until a request without it."""
        self.waits = waits and (self.waits or not self.stopping)
        self.stopping = True

    def clear(self) -> None:
        """Clear the caches between two updates; the footprint follows later."""
        if self.alive and self.ready and not self.hung:
            self.send(ev.Cleared, int(self.held_mib() * MIB), 0)
            self.world.clock.later(self.world.chance.uniform(0, 2), self._cleared)

    def _cleared(self) -> None:
        self.cache_mib = 0.0

    def autopsy(self) -> None:
        """Answer after a while; a hung worker never does."""
        if self.alive and self.ready and not self.hung:
            self.world.clock.later(self.world.chance.uniform(0.01, 3), self._autopsied)

    def _autopsied(self) -> None:
        if self.alive and not self.hung:
            self.send(ev.Autopsied, self.step, ("arrays: float32 [8, 512]: 2 → 90",), 0.5)

    def resize(self, batch: int, effective: int) -> None:
        """From the next update on."""
        self.batch, self.effective = batch, effective

    def send(self, kind: type[ev.WorkerEvent], *words: object) -> None:
        """Send a frame to the supervisor."""
        delay_s = self.world.channel.delay_s()
        if delay_s is not None:
            at_s = self.world.clock.now_s + delay_s
            self.world.channel.send(delay_s, kind(at_s, self.generation, *words))
