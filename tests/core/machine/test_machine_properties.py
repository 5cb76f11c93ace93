"""Invariants of the machine under any events in any order."""

import json
import math
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.core.policies import batch_policy, memory_policy, restart_policy

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.core.machine.stopping import KILLS_AT_MOST
from mlx_supervisor.core.policy import MIB, RunPolicy

counts = st.integers(0, 2**62)
small = st.integers(0, 20)
batches = st.integers(1, 16)
seconds = st.floats(0, 1e9)
texts = st.text(max_size=30)
footprints = st.one_of(st.integers(0, 3000).map(lambda mib: mib * MIB), counts)
offsets = st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, -2])
"""Of an event's generation from the current one: mostly 0."""
ACTIONS = ["spawn", "RequestStop", "RequestAutopsy", "RequestClearCache", "Kill", "SaveHistory", ""]
TO_A_WORKER = (ac.Kill, ac.Terminate, ac.RequestStop, ac.RequestClearCache, ac.RequestAutopsy, ac.DumpStacks)
policies = st.builds(
    RunPolicy,
    st.builds(
        memory_policy,
        st.just(2200 * MIB),
        confirm_samples=st.integers(1, 3),
        missing_samples=st.integers(1, 3),
        clear_first=st.booleans(),
        gradient_checkpointing=st.sampled_from(["never", "last_resort", "always"]),
        autopsy=st.booleans(),
    ),
    st.builds(
        batch_policy,
        st.one_of(st.none(), st.integers(4, 16)),
        accumulation=st.integers(1, 3),
        preserve_effective=st.booleans(),
        minimum=st.integers(1, 4),
        start=st.one_of(st.none(), st.integers(4, 16)),
        grow_after_steps=st.integers(1, 4),
        halve_on_leak=st.booleans(),
    ),
    st.builds(
        restart_policy,
        max_without_progress=st.integers(1, 4),
        max_memory_without_progress=st.integers(1, 4),
        max_same_error=st.integers(1, 3),
        max_external=st.integers(1, 3),
        max_reboots=st.integers(1, 3),
        backoff_s=st.sampled_from([0.0, 1.0]),
        wait_for_memory_s=st.sampled_from([0.0, 100.0]),
        hang_timeout_s=st.one_of(st.none(), st.just(30.0)),
        close_after_steps=st.integers(1, 4),
    ),
)


class AnyOrder(RuleBasedStateMachine):
    """Feeds one machine, and tracks independently what it may do."""

    @initialize(policy=policies, start=st.booleans())
    def begin(self, policy: RunPolicy, start: bool) -> None:
        self.policy = policy
        self.machine = Run(policy)
        self.now_s = 0.0
        self.alive = False  # spawned, with neither an exit nor a failed start reported
        self.last_generation = 0
        self.autopsies = 0  # the last generation with an autopsy request
        self.resized: int | None = None
        if start:
            self.feed(ev.Command(0.0, ev.CommandKind.START))

    # ---- the checks

    def feed(self, event: ev.Event) -> None:
        before, tripped = self.machine.state, self.machine.batch.tripped
        if self._ends_worker(event):
            self.alive = False
        actions = apply(self.machine, event)
        saved = False
        for action in actions:
            saved = saved or isinstance(action, ac.SaveHistory)
            if isinstance(action, ac.Spawn):
                self._check_spawn(action, saved)
            elif isinstance(action, ac.RequestResize):
                assert not any(action.batch_size >= each for each in tripped), "grew onto a size that tripped"
                assert saved
            elif isinstance(action, ac.Finish):
                assert action.reason
                assert action.outcome in ("completed", "stopped", "failed")
            elif isinstance(action, ac.RequestAutopsy):
                assert self.policy.memory.autopsy
                assert self.autopsies < self.last_generation, "two autopsies in one generation"
                self.autopsies = self.last_generation
            if isinstance(action, TO_A_WORKER):
                assert action.generation == self.machine.history.generation == self.last_generation
                assert self.alive
        entered_rest = self.machine.state in AT_REST and before not in AT_REST
        assert sum(isinstance(action, ac.Finish) for action in actions) == entered_rest or isinstance(
            event, ev.Recovered
        )

    def _ends_worker(self, event: ev.Event) -> bool:
        if isinstance(event, ev.Exited):
            return event.generation == self.last_generation
        starting = self.machine.state is State.STARTING and self.machine.current is not None
        if isinstance(event, ev.ActionFailed) and event.action == "spawn" and starting:
            return self.machine.current is not None and self.machine.current.pid is None
        return isinstance(event, ev.Recovered) and self.machine.state in AT_REST

    def _check_spawn(self, spawn: ac.Spawn, saved: bool) -> None:
        assert not self.alive, "two workers"
        assert saved, "the history was not durable before the start"
        assert spawn.generation == self.last_generation + 1, "a generation repeated or skipped"
        setting = self.policy.memory.gradient_checkpointing
        assert spawn.gradient_checkpointing is (setting == "always") or setting == "last_resort"
        assert spawn.checkpoint_every_steps is None or spawn.checkpoint_every_steps >= 1
        self.alive, self.last_generation = True, spawn.generation

    @invariant()
    def holds(self) -> None:
        machine, batch = self.machine, self.machine.batch
        deadline_s = machine.next_deadline()
        assert (deadline_s is None) == (machine.state in AT_REST)
        assert deadline_s is None or math.isfinite(deadline_s)
        if batch.size is not None and batch.requested is not None:
            assert min(batch.minimum, batch.requested) <= batch.size <= batch.requested
            assert batch.effective is not None
            assert batch.effective >= 1
        assert len(batch.tripped) <= 5
        assert machine.kills <= KILLS_AT_MOST
        past = machine.history
        again = RunHistory.restore(json.loads(json.dumps(past.snapshot())))
        assert again == replace(past, loss=past.loss if past.loss is None or math.isfinite(past.loss) else None)
        assert 0 <= (past.goodput or 0) <= 1

    # ---- the world

    def _g(self, offset: int) -> int:
        return self.machine.history.generation + offset

    @rule(seconds=st.one_of(st.floats(0, 1), st.floats(0, 1e6)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.feed(ev.Tick(self.now_s))

    @rule()
    def deadline(self) -> None:
        deadline_s = self.machine.next_deadline()
        if deadline_s is not None:
            self.now_s = max(self.now_s, deadline_s)
            before = (self.machine.state, deadline_s)
            self.feed(ev.Tick(self.now_s))
            assert (self.machine.state, self.machine.next_deadline()) != before, "an unchanged deadline is a busy loop"

    @rule(back_s=seconds)
    def a_tick_from_the_past(self, back_s: float) -> None:
        self.feed(ev.Tick(self.now_s - back_s))

    @rule(kind=st.sampled_from(ev.CommandKind), reason=texts)
    def command(self, kind: ev.CommandKind, reason: str) -> None:
        self.feed(ev.Command(self.now_s, kind, reason))

    @rule(offset=offsets)
    def spawned(self, offset: int) -> None:
        self.feed(ev.Spawned(self.now_s, self._g(offset), 7))

    @rule(offset=offsets, step=small, of=small, batch=batches, as_requested=st.booleans(), effective=batches,
          can=st.booleans())  # fmt: skip
    def ready(self, offset: int, step: int, of: int, batch: int, as_requested: bool, effective: int, can: bool) -> None:
        if as_requested:
            batch = self.machine.batch.size or batch
        words = (step, of, batch, max(batch, effective), "step-1", ("x",), (), can, can)
        self.feed(ev.Ready(self.now_s, self._g(offset), *words))

    @rule(offset=offsets, step=small, loss=st.floats(), seconds=seconds, cache=footprints, mib=st.integers(0, 3000),
          phase=st.sampled_from(ev.Phase), batch=batches, times=st.integers(1, 20))  # fmt: skip
    def steps(self, offset: int, step: int, loss: float, seconds: float, cache: int, mib: int, phase: ev.Phase,
              batch: int, times: int) -> None:  # fmt: skip
        for _ in range(times):
            step, mib = step + 1, mib + 50
            self.feed(ev.Sample(self.now_s, self._g(offset), mib * MIB, 1, 1))
            report = (step, loss, 1, 1, 1e-3, seconds, batch, 1, 1, cache)
            self.feed(ev.StepReport(self.now_s, self._g(offset), *report, phase, process_bytes=cache))

    @rule(offset=offsets, footprint=footprints, available=counts, processes=small)
    def sample(self, offset: int, footprint: int, available: int, processes: int) -> None:
        self.feed(ev.Sample(self.now_s, self._g(offset), footprint, available, processes))

    @rule(available=footprints, pressure=st.sampled_from(ev.MemoryPressure))
    def machine_sample(self, available: int, pressure: ev.MemoryPressure) -> None:
        waiting = self.machine.state is State.WAITING
        self.feed(ev.MachineSample(self.now_s, available, pressure))
        assert self.machine.state is not State.WAITING or waiting

    @rule(offset=offsets, findings=st.lists(texts, max_size=30), complete=st.booleans())
    def autopsied(self, offset: int, findings: list[str], complete: bool) -> None:
        self.feed(ev.Autopsied(self.now_s, self._g(offset), 3, tuple(findings), 0.1, complete))

    @rule(offset=offsets)
    def sample_missing(self, offset: int) -> None:
        self.feed(ev.SampleMissing(self.now_s, self._g(offset), "no such file"))

    @rule(offset=offsets, step=small, ok=st.booleans(), seconds=seconds)
    def checkpoint(self, offset: int, step: int, ok: bool, seconds: float) -> None:
        self.feed(ev.CheckpointReport(self.now_s, self._g(offset), step, ok, seconds, 0.1, 5, "" if ok else "full"))

    @rule(offset=offsets, phase=st.sampled_from(ev.Phase))
    def phase(self, offset: int, phase: ev.Phase) -> None:
        self.feed(ev.PhaseChange(self.now_s, self._g(offset), phase))

    @rule(offset=offsets, active=counts)
    def cleared(self, offset: int, active: int) -> None:
        self.feed(ev.Cleared(self.now_s, self._g(offset), active, 0))

    @rule(offset=offsets, outcome=st.sampled_from(ev.Outcome), reason=texts, step=small)
    def bye(self, offset: int, outcome: ev.Outcome, reason: str, step: int) -> None:
        self.feed(ev.Bye(self.now_s, self._g(offset), outcome, reason, step, None, None))

    @rule(offset=offsets, code=st.sampled_from([0, 1, 65, 75, 78, None]), signal=st.sampled_from([None, 6, 9, 15]),
          oom=st.sampled_from([None, True, False]),
          tail=st.sampled_from(["", "MemoryError", "KeyError: 3", "x\n\n"]))  # fmt: skip
    def exited(self, offset: int, code: int | None, signal: int | None, oom: bool | None, tail: str) -> None:
        self.feed(ev.Exited(self.now_s, self._g(offset), None if signal else code, signal, tail, oom))

    @rule(action=st.sampled_from(ACTIONS), error=texts)
    def action_failed(self, action: str, error: str) -> None:
        self.feed(ev.ActionFailed(self.now_s, action, error))

    @rule(offset=offsets, host=st.booleans(), step=small)
    def recovered(self, offset: int, host: bool, step: int) -> None:
        self.feed(ev.Recovered(self.now_s, self._g(offset), host, step))

    @rule(data=st.data(), at_s=seconds)
    def out_of_order(self, data: st.DataObject, at_s: float) -> None:
        generation = self._g(0)
        event = data.draw(st.sampled_from([
            ev.Sample(at_s, generation, MIB, 1, 1), ev.PhaseChange(at_s, generation, ev.Phase.TRAIN),
            ev.Cleared(at_s, generation, 1, 1), ev.CheckpointReport(at_s, generation, 1, True, 1, 1, 1),
        ]))  # fmt: skip
        self.feed(event)


AnyOrder.TestCase.settings = settings(
    max_examples=3 * settings().max_examples // 2,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase
