"""Names that a misspelt one may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean NAME?` for the nearest of `names`; "" if none is near. `prefix` precedes it."""
    text = str(name)[:100].lower().replace("-", "_")
    known = {each.lower(): each for each in names}
    contained = sorted((each for each in known if len(each) > 3 and text.startswith(each)), key=len)
    near = contained[-1:] or difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{known[near[0]]}?" if near else ""


def or_list(name: object, names: Iterable[str], prefix: str = "") -> str:
    """The nearest name as a question, else the names that are allowed."""
    names = list(names)
    return did_you_mean(name, names, prefix) or f"; allowed are {', '.join(names)}"
