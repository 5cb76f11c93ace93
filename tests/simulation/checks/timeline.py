"""A world's events and the machine's answers, one line each."""

from collections import deque
from dataclasses import fields
from enum import Enum

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev

LINES_AT_MOST = 200_000
_LOUD = (ev.Sample, ev.StepReport)


class EventTimeline:
    """`lines` are bounded: the oldest are dropped."""

    def __init__(self, every: bool = False) -> None:
        self.lines: deque[str] = deque(maxlen=LINES_AT_MOST)
        self._every = every
        self._skipped = 0

    def note(self, number: int, event: ev.Event, before: str, after: str, actions: list[ac.Action]) -> None:
        """Add an event and its answer; samples and steps without effect are only counted."""
        if before == after and not actions and isinstance(event, _LOUD) and not self._every:
            self._skipped += 1
            return
        if self._skipped:
            self.lines.append(f"{'':>16} … {self._skipped} samples and steps")
            self._skipped = 0
        way = before if before == after else f"{before} -> {after}"
        self.lines.append(f"{number:>6} {event.at_s:>9.2f} {shown(event)}  [{way}]")
        self.lines += [f"{'':>18}{shown(action)}" for action in actions]

    def add_text(self, text: str) -> None:
        """Add something that is no event of the machine."""
        self.lines.append(f"{'':>6} {'':>9} ({text})")


def shown(thing: ev.Event | ac.Action) -> str:
    """In one line: a notice's text, or the fields that differ from their defaults."""
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
            "without_progress",
            "unfinished",
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
