"""A world's events and what the machine made of them, a line each, for people."""

from collections import deque
from dataclasses import fields
from enum import Enum

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev

LINES_AT_MOST = 200_000
_LOUD = (ev.Sample, ev.StepReport)


class Timeline:
    """`note` everything; `lines` are bounded, the oldest give way."""

    def __init__(self, every: bool = False) -> None:
        self.lines: deque[str] = deque(maxlen=LINES_AT_MOST)
        self._every = every
        self._passed_over = 0

    def note(self, number: int, event: ev.Event, before: str, after: str, actions: list[ac.Action]) -> None:
        """Samples and steps that change nothing are counted only."""
        if before == after and not actions and isinstance(event, _LOUD) and not self._every:
            self._passed_over += 1
            return
        if self._passed_over:
            self.lines.append(f"{'':>16} … {self._passed_over} samples and steps")
            self._passed_over = 0
        way = before if before == after else f"{before} -> {after}"
        self.lines.append(f"{number:>6} {event.at_s:>9.2f} {shown(event)}  [{way}]")
        self.lines += [f"{'':>18}{shown(action)}" for action in actions]

    def say(self, text: str) -> None:
        """Something that the machine isn't told."""
        self.lines.append(f"{'':>6} {'':>9} ({text})")


def shown(thing: ev.Event | ac.Action) -> str:
    """In one line: a notice by its text, anything else by its fields that are not the defaults."""
    name = type(thing).__name__
    if isinstance(thing, ac.Notice):
        return f"says {thing.kind}: {thing.text}"
    if isinstance(thing, ac.SaveHistory):
        past = thing.snapshot
        keys = (
            "generation",
            "durable_step",
            "batch_size",
            "tripped_sizes",
            "fruitless_generations",
            "wanted",
            "outcome",
        )
        return f"saves{'' if thing.wait else ' later'} " + " ".join(f"{key}={past.get(key)}" for key in keys)
    words = []
    for each in fields(thing):
        value = getattr(thing, each.name)
        if each.name == "at_s" or value == each.default:
            continue
        words.append(f"{each.name}={value.value if isinstance(value, Enum) else value!r}")
    return f"{name} {' '.join(words)}"
