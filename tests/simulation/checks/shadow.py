"""What the machine must know by what it was told: kept beside it, saved and restored with its history."""

from dataclasses import dataclass, replace


@dataclass
class Shadow:
    """`wish`: the last thing that somebody asked for ("run", "stop", "suspend"; "" before the first).

    `cooling`: the machine restarted under the run, which has not started since.
    `tripped`: sizes that a life ended at for want of memory; `durable`: the newest acknowledged step it was told of.
    """

    durable: int = 0
    tripped: frozenset[int] = frozenset()
    wish: str = ""
    cooling: bool = False

    def copy(self) -> "Shadow":
        """As it is now."""
        return replace(self)


@dataclass
class LifeWatch:
    """One life of a worker as the checks see it."""

    generation: int = 0
    trips_before: int = 0
    ordered: bool = False
    closed: bool = True
    over_limit: int = 0
    missing: int = 0
    footprint_bytes: int = 0
    durable_before: int = 0
    autopsies: int = 0
