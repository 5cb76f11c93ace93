"""Timelines: the events of a run, line by line, and the expected response of the machine.

A line is `event [key=value …] -> state[: action, action …]`. The actions are exact and in order. Sentences (notices,
and the reasons of actions) are optional: a line `| text` expects one that contains `text` among those of the event
line before it. A line advances time by 0.1 s, or by `after`; `tick` jumps to the machine's deadline.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.core.policies import DEFAULTS

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import MIB, RunPolicy

Arrow = tuple[State, str, State]


def policy(**changes: Any) -> RunPolicy:
    """Limit 2200 MiB, batch 8, short times to close and grow, no autopsies. Each key goes to the part that has it."""
    changed: dict[str, Any] = {"limit_bytes": 2200 * MIB, "size": 8, "close_after_steps": 10, "grow_after_steps": 20}
    changed |= {"autopsy": False, "jitter": 0.0} | changes
    steps = changed.pop("steps", None)
    parts: list[Any] = []
    for part in (DEFAULTS.memory, DEFAULTS.batch, DEFAULTS.restart):
        parts.append(replace(part, **{k: changed.pop(k) for k in list(changed) if hasattr(part, k)}))
    assert not changed, f"no such setting: {sorted(changed)}"
    return replace(DEFAULTS, memory=parts[0], batch=parts[1], restart=parts[2], steps=steps)


class TracedRun(Run):
    """Records every arrow of the table that was taken."""

    def __init__(self, rules: RunPolicy, history: RunHistory | None = None) -> None:
        super().__init__(rules, history)
        self.arrows: set[Arrow] = set()
        self._event = ""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        self._event = type(event).__name__
        return apply(self, event)

    def go(self, state: State, deadline_s: float | None = None) -> None:
        self.arrows.add((self.state, self._event, state))
        super().go(state, deadline_s)


def show(action: ac.Action) -> str:
    """An action as timelines write it."""
    match action:
        case ac.Spawn():
            of = "" if action.effective_batch is None else f" of {action.effective_batch}"
            every = "" if action.checkpoint_every_steps is None else f" save {action.checkpoint_every_steps}"
            again = " recompute" if action.gradient_checkpointing else ""
            return f"spawn {action.generation} batch {action.batch_size}{of}{every}{again}"
        case ac.RequestResize():
            return f"resize {action.batch_size} of {action.effective_batch}"
        case ac.CloseGeneration():
            return f"close {action.record['cause']}" + (" but alive" if action.alive else "")
        case ac.Finish():
            return f"finish {action.outcome}"
    names = {
        ac.SaveHistory: "save",
        ac.RequestStop: "ask stop",
        ac.RequestClearCache: "ask clear",
        ac.RequestAutopsy: "ask autopsy",
        ac.DumpStacks: "dump",
        ac.Terminate: "term",
        ac.Kill: "kill",
    }
    return names[type(action)]


def sentences(actions: list[ac.Action]) -> list[str]:
    """What users read of these actions."""
    texts = [action.text for action in actions if isinstance(action, ac.Notice)]
    return texts + [each.reason for each in actions if isinstance(each, ac.Finish | ac.RequestStop | ac.Kill)]


class MachineTimeline:
    """One machine and its clock."""

    def __init__(self, rules: RunPolicy | None = None, history: RunHistory | None = None) -> None:
        self.machine = TracedRun(rules or policy(), history)
        self.at_s = 1000.0
        self.step = 0
        self.mib = 500.0
        self.actions: list[ac.Action] = []
        """Every action so far."""

    def play(self, script: str) -> "MachineTimeline":
        """Play and check every line of `script`."""
        got: list[ac.Action] = []
        for line in filter(None, (line.split("#")[0].strip() for line in script.splitlines())):
            if line.startswith("|"):
                text = line.removeprefix("|").strip()
                assert any(text in each for each in sentences(got)), f"{line}\n  got {sentences(got)}"
                continue
            event, arrow, expected = (part.strip() for part in line.partition("->"))
            assert arrow, f"no expectation: {line}"
            got = self._play_line(event)
            state, _, actions = (part.strip() for part in expected.partition(":"))
            done = ", ".join(show(action) for action in got if not isinstance(action, ac.Notice))
            assert (self.machine.state, done) == (state, actions), f"{line}\n  at {self.at_s} got {got}"
        return self

    def texts(self, kind: str) -> list[str]:
        """The texts of all notices of this kind so far."""
        return [action.text for action in self.actions if isinstance(action, ac.Notice) and action.kind == kind]

    def feed(self, event: ev.Event) -> list[ac.Action]:
        """Feed one event."""
        done = self.machine.apply(event)
        self.actions += done
        assert not [each for each in sentences(done) if "\n" in each or "None" in each]
        return done

    def _play_line(self, text: str) -> list[ac.Action]:
        verb, *rest = text.split()
        words = [word for word in rest if "=" not in word]
        keys = dict(word.split("=") for word in rest if "=" in word)
        self.at_s += float(keys.pop("after", 0.1))
        done: list[ac.Action] = []
        state = self.machine.state
        for event in getattr(self, f"_{verb}")(words, keys):
            done += self.feed(event)
            if self.machine.state is not state:
                break
        assert not keys, f"unknown keys: {keys}"
        return done

    @property
    def _generation(self) -> int:
        return self.machine.history.generation

    # ---- the verbs

    def _command(self, kind: ev.CommandKind) -> Callable[..., Iterator[ev.Event]]:
        return lambda words, keys: iter([ev.Command(self.at_s, kind, " ".join(words))])

    def __getattr__(self, name: str) -> Callable[..., Iterator[ev.Event]]:
        try:
            return self._command(ev.CommandKind(name.removeprefix("_")))
        except ValueError:
            raise AttributeError(name) from None

    def _ready(self, _: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        past = self.machine.history
        self.step = int(keys.pop("step", past.durable_step))
        batch = int(keys.pop("batch", self.machine.batch.size or 8))
        effective = int(keys.pop("effective", self.machine.batch.effective or batch))
        can = keys.pop("can", "no") == "yes"
        current = self.machine.current
        on = can and current is not None and current.gradient_checkpointing
        words = (int(keys.pop("target", 1000)), batch, effective)
        yield ev.Ready(
            self.at_s, self._generation, self.step, *words, gradient_checkpointing=on, can_checkpoint_gradients=can
        )

    def _steps(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """Up to `words[0]` steps, each with one sample; fewer when the state changes."""
        self.mib = float(keys.pop("mib", self.mib))
        grow, cache, seconds = (float(keys.pop(k, d)) for k, d in (("grow", 0), ("cache", 0), ("seconds", 0.3)))
        active, leak = float(keys.pop("active", 0)), float(keys.pop("leak", 0))
        limit_bytes = self.machine.device.limit_bytes
        batch = int(keys.pop("batch", self.machine.batch.size or 8))
        accumulation = max((self.machine.batch.effective or batch) // batch, 1)
        for _ in range(int(words[0])):
            self.step += 1
            self.mib += grow
            active += leak
            self.at_s += seconds
            yield ev.Sample(self.at_s, self._generation, int(self.mib * MIB), 2**40, 1)
            memory = (int((active if limit_bytes else self.mib) * MIB), int(cache * MIB))
            yield ev.StepReport(
                self.at_s, self._generation, self.step, 1.0, 100, batch * accumulation, 1e-3, seconds, batch,
                accumulation, *memory, process_bytes=int(self.mib * MIB), device_limit_bytes=limit_bytes,
            )  # fmt: skip

    def _sample(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """`words[1]` samples of `words[0]` MiB."""
        for _ in range(int(words[1]) if len(words) > 1 else 1):
            yield ev.Sample(self.at_s, self._generation, int(float(words[0]) * MIB), 2**40, 1)

    def _missing(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        for _ in range(int(words[0])):
            self.at_s += 0.05
            yield ev.SampleMissing(self.at_s, self._generation, "no such file")

    def _saved(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        step = int(words[0]) if words else self.step
        error = keys.pop("error", "")
        seconds = float(keys.pop("seconds", 0.2))
        yield ev.CheckpointReport(self.at_s, self._generation, step, not error, seconds, 0.1, 10 * MIB, error)

    def _cleared(self, _: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        yield ev.Cleared(self.at_s, self._generation, 0, 0)

    def _machine(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """`machine 900` or `machine 900 critical`: available MiB, and the memory pressure. `device=50`: free MiB."""
        pressure = ev.MemoryPressure(words[1]) if len(words) > 1 else ev.MemoryPressure.NORMAL
        free = int(float(keys.pop("device")) * MIB) if "device" in keys else None
        yield ev.MachineSample(self.at_s, int(float(words[0]) * MIB), pressure, free)

    def _device(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        """`device 1000 4000`: the limit on a device with its own memory, and all of it, in MiB."""
        limit, total = (int(float(each) * MIB) for each in words)
        yield ev.DeviceFound(self.at_s, self._generation, total, limit, "GPU-1")

    def _driver(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        """`driver 600 3000 2`: this run's MiB by the driver (`?`: unknown), the free MiB, and how often in a row."""
        used, free = (None if each == "?" else int(float(each) * MIB) for each in words[:2])
        for _each in range(int(words[2]) if len(words) > 2 else 1):
            yield ev.DeviceSample(self.at_s, self._generation, used, free or 0, self.machine.device.total_bytes)

    def _autopsied(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        """`autopsied list, dict`: findings, separated by commas."""
        findings = tuple(each.strip() for each in " ".join(words).split(",") if each.strip())
        yield ev.Autopsied(self.at_s, self._generation, self.step, findings, 0.1)

    def _phase(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        """`phase eval`, or `phase checkpoint room on the disk`: what the worker waits for."""
        yield ev.PhaseChange(self.at_s, self._generation, ev.Phase(words[0]), "", " ".join(words[1:]))

    def _bye(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """`bye completed`: at the last step, or at `step=N`."""
        reason = " ".join(words[1:])
        step = int(keys.pop("step", self.machine.history.target_steps if words[0] == "completed" else self.step))
        lost = keys.pop("lost", "")
        yield ev.Bye(self.at_s, self._generation, ev.Outcome(words[0]), reason, step, 1.0, None, lost=lost)

    def _paused(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        """`paused 45`: the supervisor did not run for so many seconds."""
        yield ev.Paused(self.at_s, float(words[0]))

    def _blocked(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """`blocked REASON`: another process holds the run's folder."""
        yield ev.StartBlocked(self.at_s, self._generation, " ".join(words), keys.pop("lasting", "no") == "yes")

    def _exit(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """`exit CODE`, `exit signal=9 oom=yes` or `exit` for a process that is not the supervisor's child."""
        oom = {"yes": True, "no": False, "unknown": None}[keys.pop("oom", "unknown")]
        signal = int(keys.pop("signal", 0)) or None
        code = int(words.pop(0)) if words and signal is None else None
        yield ev.Exited(self.at_s, self._generation, code, signal, " ".join(words), oom)

    def _spawned(self, _: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        yield ev.Spawned(self.at_s, self._generation, 4711)

    def _fails(self, words: list[str], _: dict[str, str]) -> Iterator[ev.Event]:
        yield ev.ActionFailed(self.at_s, words[0], "no such file", passing="passing" in words)

    def _recovered(self, words: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        yield ev.Recovered(self.at_s, self._generation, words == ["host"], int(keys.pop("step", 0)))

    def _tick(self, _: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        deadline_s = self.machine.next_deadline()
        assert deadline_s is not None, "no deadline"
        self.at_s = max(self.at_s, deadline_s)
        yield ev.Tick(self.at_s)

    def _early(self, _: list[str], keys: dict[str, str]) -> Iterator[ev.Event]:
        """A tick before the deadline."""
        yield ev.Tick(self.at_s)
