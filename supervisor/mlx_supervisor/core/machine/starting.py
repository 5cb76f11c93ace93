"""How a worker's life begins: commands to a run at rest, what comes before a start, and the way to its first step."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import CloseGeneration, Level, Spawn
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.history import Life
from mlx_supervisor.core.machine.heartbeat import Heartbeat
from mlx_supervisor.core.machine.run_state import REASON_LIMIT_CHARS, Ending, MachineBase
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.restart.escalation import checkpoints_gradients


class Starts(MachineBase):
    """Handlers of a run without a worker, and of a worker that isn't ready yet."""

    # ---- commands without a worker

    def _on_command_at_rest(self, event: ev.Command) -> None:
        if event.kind in (CommandKind.START, CommandKind.RESTART):
            if self._survivor is not None:
                text = f"Not started: a process of generation {self._survivor} is still there, unkillable."
                self._say("start_refused", text, Level.ERROR)
                return
            if not self.history.wanted:
                self._budget.forget()
            self._say("start", "Starting.", batch_size=self.batch.size)
            self._cool_down(event.at_s)
        elif event.kind is not CommandKind.SUSPEND and self.history.generation > 0 and self.history.outcome == "":
            # a supervisor died in the middle of it, and now nobody wants it to go on
            self._finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped before it was started again")

    def _cool_down(self, at_s: float) -> None:
        """After a restart of the machine, which the run may have caused: not at once. Else start."""
        if self._cool_until_s is None:  # the supervisor that took over is gone too
            self._cool_until_s = at_s + self.policy.restart.reboot_cooldown_s
        if not self.history.cooling or self._cool_until_s <= at_s:
            self._start(at_s)
            return
        text = f"the machine restarted under the run, which goes on in {self._cool_until_s - at_s:.0f} s"
        self._pause("cooldown", f"{text} (restart.reboot_cooldown_s)")
        self._go(S.BACKOFF, self._cool_until_s)
        self._save()

    def _pause(self, kind: str, text: str) -> None:
        """A start that is still to come: a supervisor that dies meanwhile must not forget it."""
        self.history.wanted, self.history.outcome = True, ""
        self.reason = text
        self._say(kind, f"{text[0].upper()}{text[1:]}.", Level.WARNING)

    def _on_survivor_gone(self, event: ev.Exited) -> None:
        if self._survivor is not None:
            self._say("survivor_gone", f"The unkillable process of generation {self._survivor} is gone.")
            self._survivor = None
            if self._ending is not None:
                self._close_life(event.at_s, "not killable", self._ending.cause)

    def _on_command_in_backoff(self, event: ev.Command) -> None:
        if event.kind in (CommandKind.START, CommandKind.RESTART):
            self._spawn(event.at_s)
            return
        if event.kind is not CommandKind.SUSPEND:
            self.history.cooling = False  # somebody is there, who may start it again at once
        self._go(S.STOPPED)
        self._finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped while waiting to restart")

    def _on_command_while_waiting(self, event: ev.Command) -> None:
        if event.kind is not CommandKind.SUSPEND:
            self._memory.accept()
        self._on_command_in_backoff(event)

    def _on_recovered(self, event: ev.Recovered) -> None:
        past = self.history
        self._survivor = None
        if event.generation == past.generation:  # else an older one, whose end alone could not be noted
            past.add_lost_life(event)
        cause = Cause.HOST_LOST if event.machine_restarted else Cause.SUPERVISOR_LOST
        self._say("recovered", f"Took over generation {event.generation}: {cause.value}.", Level.WARNING)
        life = Life.recovered(event, self.batch.size, checkpoints_gradients(self.policy, past))
        self._out.append(CloseGeneration(event.generation, life.record(event.at_s, "lost", cause.value)))
        past.failures += event.machine_restarted  # a supervisor's death alone leaves the worker time to save
        spent = None
        if event.machine_restarted:
            past.cooling = True
            self._cool_until_s = event.at_s + self.policy.restart.reboot_cooldown_s
            spent = self._budget.rebooted(progress=past.durable_step > past.durable_before)
        if spent is not None:
            self._go(S.FATAL)
            self._finish(S.FATAL, spent)
            return
        self._save()

    # ---- before a start

    def _on_backoff_over(self, event: ev.Tick) -> None:
        self._start(event.at_s)

    def _on_machine_sample(self, event: ev.MachineSample) -> None:
        self._memory.look(event.available_bytes, event.pressure)

    def _start(self, at_s: float) -> None:
        """Start a worker, as soon as the machine has the memory."""
        wait_s = self.policy.restart.wait_for_memory_s
        if wait_s <= 0 or not self._memory.short(self._need_bytes):
            self._spawn(at_s)
            return
        there = self._memory.words(self._need_bytes)
        self._pause("waiting", f"waiting for memory: {there} (at most {wait_s:.0f} s: restart.wait_for_memory_s)")
        self._go(S.WAITING, at_s + wait_s)
        self._save()

    def _on_memory_looked_at(self, event: ev.MachineSample) -> None:
        self._memory.look(event.available_bytes, event.pressure)
        if not self._memory.short(self._need_bytes):
            self._say("waited", f"Enough memory again ({self._memory.words(self._need_bytes)}): starting.")
            self._spawn(event.at_s)

    def _on_wait_over(self, event: ev.Tick) -> None:
        """Another program may simply hold it: the run's own limit still stands, and it won't wait for that again."""
        there, after_s = self._memory.words(self._need_bytes), self.policy.restart.wait_for_memory_s
        text = f"Still {there} after {after_s:.0f} s: another program may hold the rest; starting all the same."
        self._say("waited", text, Level.WARNING)
        self._memory.accept()
        self._spawn(event.at_s)

    def _spawn(self, at_s: float) -> None:
        past = self.history
        past.generation += 1
        past.wanted, past.outcome, past.cooling = True, "", False
        past.durable_before = past.durable_step
        past.begin_life()
        self.reason = ""
        self.breaker.begin_life()
        self._memory.started()
        self._heartbeat = Heartbeat(self.policy.restart.hang_timeout_s)
        self.life = Life(past.generation, at_s, batch_size=self.batch.size, durable_before=past.durable_step)
        self.life.gradient_checkpointing = checkpoints_gradients(self.policy, past)
        self.last_sample = self.last_step = self._ending = self._bye = self._relief = None
        self._missing = self._kills = 0
        self._autopsy_asked = self._autopsy_due = False
        self._go(S.STARTING, at_s + self.policy.restart.start_timeout_s)
        self._save()
        self._out.append(
            Spawn(
                past.generation,
                self.batch.size,
                self.batch.effective,
                past.tighter_steps,
                past.mean_time_between_failures_s,
                self.life.gradient_checkpointing,
            )
        )

    # ---- a worker starts

    def _on_spawned(self, event: ev.Spawned) -> None:
        self._budget.started()
        if self.life is not None:
            self.life.pid = event.pid

    def _on_ready(self, event: ev.Ready) -> None:
        past = self.history
        past.target_steps = event.target_steps
        past.durable_step = max(past.durable_step, event.step)
        past.highest_step = max(past.highest_step, event.step)
        past.can_checkpoint_gradients = event.can_checkpoint_gradients
        for each in event.passed_over:
            self._say("checkpoint_passed_over", f"Checkpoint passed over: {each}", Level.WARNING)
        for each in event.notes:
            self._say("note", each)
        if not self._obeys(event.at_s, event.batch_size):
            return
        self.batch.adopt(event.batch_size, event.effective_batch)
        origin = f"from {event.checkpoint}" if event.checkpoint else "from the beginning"
        text = (
            f"Ready at step {event.step} of {event.target_steps}, {origin}; "
            f"{event.batch_size} samples at once, {event.effective_batch} an update{self._in_which_way(event)}."
        )
        self._say("ready", text, step=event.step, target_steps=event.target_steps, batch_size=event.batch_size)
        self._heartbeat.progress(event.at_s, Phase.TRAIN)
        self._go(S.RUNNING)

    def _in_which_way(self, event: ev.Ready) -> str:
        assert self.life is not None
        asked = self.life.gradient_checkpointing
        self.life.ready_step = event.step
        self.life.gradient_checkpointing = event.gradient_checkpointing
        if event.gradient_checkpointing:
            return ", with gradient checkpointing"
        return ", without the gradient checkpointing asked for, which this task hasn't" if asked else ""

    def _obeys(self, at_s: float, batch_size: int) -> bool:
        ordered = self.batch.size
        if ordered is None or batch_size == ordered:
            return True
        text = f"the worker holds {batch_size} samples at once, {ordered} were ordered"
        self._say("batch_mismatch", f"Bug: {text}.", Level.ERROR)
        self._kill(at_s, Ending(Cause.REFUSED, text, restart=False))
        return False
