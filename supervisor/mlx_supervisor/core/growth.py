"""What grows in a worker, by cause, and how long the room lasts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

CAUSES = ("arrays", "cache", "native", "children")
"""MLX's active memory; its cache; graphs, compiled programs and all else of the leader; its children."""


@dataclass(frozen=True, slots=True)
class Growth:
    """The floor's growth, in bytes a step.

    `bytes_per_step`: None while too little is known, 0 when it can't be told from noise. `by_cause`: the same by the
    names of `CAUSES`, as far as known. `verdict`: a leak beyond doubt. `steps_left`, `seconds_left`: until the floor
    with the usual spikes passes the limit at this pace; None when it does not grow.
    """

    bytes_per_step: float | None = None
    by_cause: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    verdict: bool = False
    steps_left: float | None = None
    seconds_left: float | None = None
