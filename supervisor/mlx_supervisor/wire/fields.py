"""Field types that messages and files share, and the error for data that does not fit them."""

from typing import Annotated, Literal

import msgspec

VERSION = 1
RunName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
ShortText = Annotated[str, msgspec.Meta(max_length=512)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
METRICS_LIMIT = 16
"""Metrics of one report."""
METRIC_NAME_LIMIT = 64
MetricName = Annotated[str, msgspec.Meta(min_length=1, max_length=METRIC_NAME_LIMIT)]
Metrics = Annotated[dict[MetricName, float | None], msgspec.Meta(max_length=METRICS_LIMIT)]
"""A task's own figures by name. None: the value is not a finite number."""
PhaseName = Literal["load", "train", "eval", "checkpoint"]


class WireError(ValueError):
    """A frame or a file that can't be used. `kind`: oversized, malformed, version or type."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
