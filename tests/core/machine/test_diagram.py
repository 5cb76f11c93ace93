"""docs/states.md matches the machine."""

from pathlib import Path

from mlx_supervisor.core.machine import diagram
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.machine.table import TABLE

DOCUMENT = Path(__file__).parents[3] / "docs" / "states.md"


def test_the_document_is_drawn_from_the_table() -> None:
    hint = "python -m mlx_supervisor.core.machine.diagram > docs/states.md"
    assert DOCUMENT.read_text(encoding="utf-8") == diagram.document(), hint


def test_every_state_and_arrow_is_drawn() -> None:
    drawn = diagram.diagram()
    for state in State:
        assert f" {state}" in drawn
    arrows = {
        (source, target) for source, rules in TABLE.items() for _, targets in rules.values() for target in targets
    }
    for source, target in arrows:
        assert f"    {source} --> {target}: " in drawn
