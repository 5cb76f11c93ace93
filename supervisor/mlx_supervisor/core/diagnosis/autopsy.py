"""The one line about an autopsy that a person reads; the findings themselves are in the log."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mlx_supervisor.core.words import shortened

LINE_CHARS = 120
_FINDING = re.compile(r"(?P<kind>arrays|objects|compiled): (?P<what>.+?): (?P<counts>[\d,]+ → .+)")
_HOLDER = re.compile(
    r"; referenced by (?P<holder>.+?)(?:, (?:attribute|closure|in|local|global)\b.*?)?(?: \((?P<place>[^()]*)\))?$"
)


class Headline(NamedTuple):
    """`text`: a sentence. `what`: what grows and what refers to it, equal for the same leak; "" if unknown."""

    text: str
    what: str


def headline(findings: Sequence[str], *, cut_short: bool) -> Headline:
    """The largest finding in one line. `cut_short`: the search ended early, usually because the worker must stop."""
    for finding in findings:
        found = _FINDING.match(finding)
        if found is None:
            continue  # a note, not something that grew
        holder = _HOLDER.search(found["counts"])
        counts = found["counts"] if holder is None else found["counts"][: holder.start()]
        place = "" if holder is None or not holder["place"] else f" ({holder['place'].rpartition('/')[2]})"
        referrer = "" if holder is None else f"; referenced by {holder['holder']}{place}"
        text = shortened(f"Growing: {found['kind']} {found['what']}, {counts}{referrer}", LINE_CHARS)
        return Headline(f"{text}.", f"{found['kind']} {found['what']}{referrer}")
    if cut_short:
        return Headline("No cause found (too near the limit).", "")
    return Headline("No cause of the growth found.", "")
