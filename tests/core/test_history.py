"""The history is restored unchanged, or refused."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_supervisor.core.events import Recovered, StepReport
from mlx_supervisor.core.history import DEFAULT_MTBF_S, RunHistory

VALUES: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**53),
    float: st.floats(0, 1e12),
    bool: st.booleans(),
    str: st.text(),
    list[int]: st.lists(st.integers(0, 2**53), max_size=9),
    list[float]: st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=9),
    list[str]: st.lists(st.text(), max_size=9),
    dict[str, float | None]: st.dictionaries(st.text(max_size=8), st.none() | st.floats(0, 1e12), max_size=3),
    int | None: st.none() | st.integers(0, 2**53),
    float | None: st.none() | st.floats(allow_nan=False, allow_infinity=False),
    str | None: st.none() | st.text(),
}
histories = st.builds(RunHistory, **{each.name: VALUES[each.type] for each in fields(RunHistory)})


@given(histories)
def test_round_trip_by_way_of_json(history: RunHistory) -> None:
    assert RunHistory.restore(json.loads(json.dumps(history.snapshot()))) == history


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_json_cannot_hold_is_left_out(loss: float) -> None:
    json.dumps(RunHistory(loss=loss).snapshot(), allow_nan=False)


def test_a_snapshot_is_a_copy() -> None:
    history = RunHistory(tripped_sizes=[8])
    snapshot = history.snapshot()
    restored = RunHistory.restore(snapshot)
    history.tripped_sizes.append(4)
    assert snapshot["tripped_sizes"] == restored.tripped_sizes == [8]


def test_unknown_keys_are_ignored() -> None:
    assert RunHistory.restore({"generation": 3, "colour": "blue"}) == RunHistory(generation=3)


def test_the_keys_of_older_journals_are_read() -> None:
    older = {"asked_size": 8, "asked_effective": 16, "barren_lives": 2, "barren_memory_lives": 3, "wanted": True}
    counted = {"life_steps": 5, "life_train_s": 2.5, "life_active_s": 4.0}
    restored = RunHistory.restore(older | counted)
    assert (restored.unfinished, restored.requested_size, restored.requested_effective) == (True, 8, 16)
    assert (restored.without_progress, restored.memory_without_progress) == (2, 3)
    assert (restored.generation_steps, restored.generation_train_s, restored.generation_active_s) == (5, 2.5, 4.0)


FIRST_KEYS = """
    generation batch_size asked_size asked_effective tripped_sizes leak_from least_size gradient_checkpointing
    can_checkpoint_gradients barren_lives barren_memory_lives waits reboots cooling last_error last_error_step
    same_errors trips highest_step durable_step target_steps replayed_steps useful_s train_s stall_s active_s
    life_steps life_train_s life_active_s loss weights_sha256 durable_before tighter_steps limit_bytes failures
    breaker_open autopsy error wanted outcome reason
"""


@pytest.mark.parametrize("key", FIRST_KEYS.split())
def test_no_key_of_the_first_journals_is_ignored(key: str) -> None:
    with pytest.raises(ValueError, match="history: "):
        RunHistory.restore({key: object()})


@pytest.mark.parametrize(("key", "value"), [
    ("generation", "3"), ("generation", 3.0), ("generation", None), ("generation", True), ("batch_size", "8"),
    ("tripped_sizes", 8), ("tripped_sizes", ["8"]), ("useful_s", "1"), ("loss", "low"), ("breaker_open", 1),
    ("autopsy", [3]), ("autopsy", "list"), ("reason", None), ("weights_sha256", 5), ("tighter_steps", 1.5),
])  # fmt: skip
def test_a_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"history: {key}"):
        RunHistory.restore({key: value})


def test_every_field_is_checked() -> None:
    for each in fields(RunHistory):
        with pytest.raises(ValueError, match=each.name):
            RunHistory.restore({each.name: object()})


def test_shares_without_data_are_none() -> None:
    assert RunHistory().goodput is None
    assert RunHistory().checkpoint_stall_fraction is None
    assert RunHistory(useful_s=6, active_s=10).goodput == pytest.approx(0.6)
    assert RunHistory(train_s=9, stall_s=1).checkpoint_stall_fraction == pytest.approx(0.1)


def test_the_mean_time_between_failures() -> None:
    assert RunHistory().mean_time_between_failures_s == DEFAULT_MTBF_S
    assert RunHistory(active_s=60.0).mean_time_between_failures_s == DEFAULT_MTBF_S
    assert RunHistory(active_s=10 * DEFAULT_MTBF_S).mean_time_between_failures_s == 10 * DEFAULT_MTBF_S
    assert RunHistory(active_s=600.0, failures=3).mean_time_between_failures_s == 200.0


def _lost(first_step: int, last_step: int, train_s: float, uptime_s: float) -> Recovered:
    return Recovered(0.0, 1, False, first_step, last_step, train_s=train_s, uptime_s=uptime_s)


def _trained(history: RunHistory, steps: range) -> None:
    for step in steps:
        history.add_step(StepReport(0.0, 1, step, 1.0, 1, 1, 0.1, 0.5, 1, 1, 0, 0))
        history.add_active(1.0)


def test_what_a_dead_supervisor_saved_is_counted_once() -> None:
    """Steps 51 to 80, saved with the checkpoint at 70; ten of them had been done before."""
    history = RunHistory(highest_step=60, useful_s=30.0, train_s=30.0, active_s=60.0)
    history.begin_generation()
    _trained(history, range(51, 71))
    restored = RunHistory.restore(json.loads(json.dumps(history.snapshot())))
    for _ in range(2):  # a supervisor that dies during recovery is followed by another recovery
        restored.add_lost_generation(_lost(51, 80, 15.0, 33.0))
        assert (restored.highest_step, restored.replayed_steps) == (80, 10)
        assert (restored.train_s, restored.useful_s, restored.active_s) == (45.0, 40.0, 93.0)


def test_a_lost_generation_without_saved_steps_is_counted_in_full() -> None:
    history = RunHistory(highest_step=60)
    history.add_lost_generation(_lost(51, 80, 15.0, 33.0))
    assert (history.highest_step, history.replayed_steps, history.train_s, history.useful_s) == (80, 10, 15.0, 10.0)
    assert history.active_s == 33.0


def test_a_journal_behind_the_history_changes_nothing() -> None:
    history = RunHistory()
    history.begin_generation()
    _trained(history, range(1, 21))
    before = history.snapshot()
    history.add_lost_generation(_lost(1, 15, 7.5, 14.0))
    history.add_lost_generation(_lost(0, 0, 0.0, 0.0))
    assert history.snapshot() == before


def report(step: int, loss: float, at_s: float, tokens: int = 100) -> StepReport:
    return StepReport(at_s, 1, step, loss, tokens, 8, 1e-3, 0.1, 8, 1, 0, 0)


def test_the_smoothed_loss_has_no_bias_to_its_start_and_leaves_out_replays_and_what_is_no_number() -> None:
    history = RunHistory()
    assert history.smoothed_loss is None
    history.add_step(report(1, 4.0, 0.0))
    assert history.smoothed_loss == pytest.approx(4.0), "one loss is its own mean"
    history.add_step(report(2, 2.0, 1.0))
    assert history.smoothed_loss == pytest.approx((0.98 * 4 + 2) / 1.98)
    before = history.smoothed_loss
    history.add_step(report(1, 400.0, 2.0))
    history.add_step(report(3, float("nan"), 3.0))
    assert history.smoothed_loss == before
    for step in range(4, 1000):
        history.add_step(report(step, 1.0, float(step)))
    assert history.smoothed_loss == pytest.approx(1.0)


def test_the_best_validation_is_kept_over_restarts_and_supervisors() -> None:
    history = RunHistory()
    for step, loss in ((0, float("nan")), (10, 2.5), (20, 2.25), (30, 2.75)):
        history.add_validation(step, loss)
    restored = RunHistory.restore(json.loads(json.dumps(history.snapshot())))
    restored.add_validation(20, 2.25)
    assert (restored.validation_loss, restored.validation_step) == (2.25, 20)
    restored.add_validation(40, float("inf"))
    assert (restored.best_validation_loss, restored.best_validation_step) == (2.25, 20)
    assert restored.validation_step == 40


def test_the_average_speed_counts_wall_time_between_updates_of_one_generation() -> None:
    history, previous = RunHistory(), None
    assert history.tokens_per_second is None
    for step, at_s in ((1, 10.0), (2, 11.0), (3, 15.0)):  # an evaluation of 3 s before the third
        history.add_step(now := report(step, 1.0, at_s), previous)
        previous = now
    assert history.tokens_per_second == pytest.approx(200 / 5)
    history.add_step(report(4, 1.0, 999.0), None)  # the first of another generation
    assert history.tokens_per_second == pytest.approx(200 / 5)
