"""Words that several messages share."""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names."""
    hidden = len(names) - most
    return separator.join(names[:most]) + (f" and {hidden} more" if hidden > 0 else "")
