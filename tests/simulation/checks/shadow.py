"""What the machine must know from its events: tracked beside it, saved and restored with its history."""

from dataclasses import dataclass, replace


@dataclass
class Shadow:
    """`request`: the last request ("run", "stop", "suspend"; "" before the first).

    `cooling`: the machine restarted during the run, which has not started since. `tripped`: sizes at which memory
    ended a generation; `durable`: the newest acknowledged step reported.
    """

    durable: int = 0
    tripped: frozenset[int] = frozenset()
    request: str = ""
    cooling: bool = False

    def copy(self) -> "Shadow":
        """A copy of the present state."""
        return replace(self)


@dataclass
class GenerationWatch:
    """One generation as the checks see it."""

    generation: int = 0
    trips_before: int = 0
    ordered: bool = False
    closed: bool = True
    over_limit: int = 0
    missing: int = 0
    footprint_bytes: int = 0
    durable_before: int = 0
    autopsies: int = 0
