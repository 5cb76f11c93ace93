"""The line about an autopsy that is on the screen; the findings are in the log."""

import pytest
from tests.core.machine.timeline import MachineTimeline, policy

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.autopsy import LINE_CHARS, headline

KEPT = "attribute of object mlx_worker.training.drills.Drills (mlx_worker/training/drills.py:19)"
NOTE = "steps 14 to 20: 79,690 objects, 83 arrays, 0 unevaluated operations; compiled batch shapes: 1"


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (
            f"arrays: uint8 [52428800]: 14 → 20, 1,000.0 MiB; referenced by list `_kept`, {KEPT}",
            "Growing: arrays uint8 [52428800], 14 → 20, 1,000.0 MiB; referenced by list `_kept` (drills.py:19).",
        ),
        (
            "arrays: float32 [], not evaluated: operations in its graph: 1,159 → 1,273, 8.0 MiB; referenced by "
            "`accuracy`, closure variable of function build.<locals>.after_update (train.py:22)",
            "Growing: arrays float32 [], not evaluated: operations in its graph, 1,159 → 1,273, 8.0 MiB; "
            "referenced by… (train.py:22).",
        ),
        ("objects: dict: 10 → 70", "Growing: objects dict, 10 → 70."),
    ],
)
def test_the_largest_finding_is_one_line_that_names_the_place(finding: str, text: str) -> None:
    found = headline([NOTE, finding, "objects: list: 1 → 2"], cut_short=False)
    assert found.text == text
    assert len(found.text) <= LINE_CHARS + 1


def test_without_a_finding_the_line_says_why() -> None:
    assert headline([NOTE], cut_short=True).text == "No cause found (too near the limit)."
    assert headline([NOTE], cut_short=False).text == "No cause of the growth found."


def test_the_screen_gets_one_line_of_an_autopsy_and_none_for_the_same_leak_again() -> None:
    line = MachineTimeline(policy(autopsy=True))
    found = ("objects: dict: 10 → 70; referenced by list `kept`, attribute of object R (train.py:9)", NOTE, NOTE)
    for again in (False, True):
        if not again:
            line.play("start -> starting: save, spawn 1 batch 8 of 8")
        line.play("ready -> running\nsteps 18 mib=500 grow=50 -> running: ask autopsy")
        before = len(line.actions)
        line.feed(ev.Autopsied(line.at_s, line.machine.history.generation, 18, found, 1.0))
        notices = [each for each in line.actions[before:] if isinstance(each, ac.Notice)]
        assert [each.kind for each in notices] == ["autopsy", "autopsy", "autopsy", "leak"]
        shown = [each.text for each in notices if not each.quiet]
        assert shown == ([] if again else ["Growing: objects dict, 10 → 70; referenced by list `kept` (train.py:9)."])
        if not again:
            line.play("exit 1 -> backoff: close crash, save\ntick -> starting: save, spawn 2 batch 8 of 8 save 9")
