"""Totals over many worlds: events, outcomes, causes, and the arrows of the table taken."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.machine.table import TABLE

Arrow = tuple[State, str, State]


@dataclass
class Tally:
    """Sums over worlds; tallies can be added up."""

    seeds: int = 0
    worlds: int = 0
    events: int = 0
    fewest_events: int = 0
    spawns: int = 0
    supervisors: int = 0
    reboots: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    arrows: Counter[Arrow] = field(default_factory=Counter)
    handled: Counter[tuple[State, str]] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Add another tally."""
        fewest = [each.fewest_events for each in (self, other) if each.fewest_events]
        for each in fields(self):
            mine, its = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(its)
            else:
                setattr(self, each.name, mine + its)
        self.fewest_events = min(fewest, default=0)

    def lines(self) -> Iterator[str]:
        """The tally as text."""
        yield (
            f"{self.seeds:,} seeds, {self.worlds:,} runs, {self.events:,} events (the fewest of a seed: "
            f"{self.fewest_events:,}), {self.spawns:,} workers, {self.supervisors:,} supervisors killed, "
            f"{self.reboots:,} reboots"
        )
        yield "outcomes:  " + _listed(self.outcomes)
        yield "actions:   " + _listed(self.actions)
        yield "states:    " + _listed(self._states())
        yield "causes recorded, and the true deaths (ordered: killed by the supervisor):"
        for cause, number in self.causes.most_common():
            truths = Counter({truth: n for (truth, named), n in self.deaths.items() if named == cause})
            yield f"  {number:>9,}  {cause:<34} {_listed(truths)}"
        yield "  never recorded: " + (", ".join(unseen) if (unseen := self.causes_unseen()) else "none")
        arrows, pairs = set(every_arrow()), set(every_pair())
        yield f"arrows of the table taken: {len(arrows & set(self.arrows))} of {len(arrows)}"
        yield f"events handled in a state that handles them: {len(pairs & set(self.handled))} of {len(pairs)}"
        for state, event, to in sorted(arrows - set(self.arrows)):
            yield f"  never taken: {state} --{event}--> {to}"
        for state, event in sorted(pairs - set(self.handled)):
            yield f"  never handled: {event} in {state}"

    def causes_unseen(self) -> list[str]:
        """Causes that no generation had."""
        return [cause.value for cause in Cause if cause.value not in self.causes]

    def _states(self) -> Counter[str]:
        states: Counter[str] = Counter()
        for (state, _), number in self.handled.items():
            states[state.value] += number
        return states


def every_arrow() -> Iterator[Arrow]:
    """All transitions that the table allows."""
    for state, rules in TABLE.items():
        for event, (_, targets) in rules.items():
            for target in targets:
                yield state, event.__name__, target


def every_pair() -> Iterator[tuple[State, str]]:
    """All events handled in each state."""
    for state, rules in TABLE.items():
        for event in rules:
            yield state, event.__name__


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.most_common()) or "none"
