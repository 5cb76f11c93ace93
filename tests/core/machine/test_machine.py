"""Every golden timeline; together they take every arrow of the table."""

import pytest
from tests.core.machine.golden_device import DEVICE
from tests.core.machine.golden_ends import ENDS
from tests.core.machine.golden_ladder import LADDER
from tests.core.machine.golden_memory import MEMORY
from tests.core.machine.golden_waiting import WAITING
from tests.core.machine.timeline import Arrow, MachineTimeline

from mlx_supervisor.core.machine.table import TABLE

GOLDEN = MEMORY | DEVICE | LADDER | WAITING | ENDS


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    rules, script = GOLDEN[name]
    MachineTimeline(rules).play(script)


def test_every_arrow_of_the_table_is_taken() -> None:
    taken: set[Arrow] = set()
    for rules, script in GOLDEN.values():
        line = MachineTimeline(rules)
        line.play(script)
        taken |= line.machine.arrows
    allowed = {
        (source, event.__name__, target)
        for source, rules_of in TABLE.items()
        for event, (_, targets) in rules_of.items()
        for target in targets
    }
    assert sorted(allowed - taken) == []
