"""The error that the checks raise."""

from collections.abc import Callable


class InvariantError(AssertionError):
    """`rule`: the invariant that was violated."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def check(holds: object, rule: str, text: str | Callable[[], str]) -> None:
    """Raise an InvariantError unless `holds`; an expensive `text` is given as a function."""
    if not holds:
        raise InvariantError(rule, text if isinstance(text, str) else text())
