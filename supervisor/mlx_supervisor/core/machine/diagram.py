"""The documentation's state diagram, drawn from the machine's table."""

from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.core.machine.table import TABLE

HEADER = """# States of a run

Drawn from the table in `core/machine/table.py` by `python -m mlx_supervisor.core.machine.diagram > docs/states.md`;
a test holds the two together. An arrow's label names the events that may take it.

"""


def diagram() -> str:
    """A Mermaid state diagram: one arrow per pair of states, labelled with its events."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for source, rules in TABLE.items():
        for event, (_, targets) in rules.items():
            for target in targets:
                arrows.setdefault((source, target), []).append(event.__name__)
    lines = ["stateDiagram-v2", f"    [*] --> {State.STOPPED}"]
    lines += [f"    {source} --> {target}: {', '.join(labels)}" for (source, target), labels in arrows.items()]
    lines += [f"    {state} --> [*]" for state in State if state in AT_REST]
    return "\n".join(lines)


def document() -> str:
    """The whole of docs/states.md."""
    return f"{HEADER}```mermaid\n{diagram()}\n```\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(document())
