"""Steps shorter than the sampling interval: their leaks are found in time, and their noise trips nothing."""

import pytest
from tests.core.memory.fast_traces import fast_replay, fast_training

UNLIMITED_MB = 1e7


@pytest.mark.parametrize(
    ("step_s", "leak_mb", "at_most_steps", "native"),
    [(0.002, 1.0, 2000, True), (0.002, 5.0, 2000, True), (0.02, 5.0, 200, True), (0.02, 5.0, 200, False)],
)
def test_a_leak_is_found_within_four_seconds(step_s: float, leak_mb: float, at_most_steps: int, native: bool) -> None:
    for seed in range(3):
        onset = int(6.0 / step_s)
        trace = fast_training(seed, step_s, onset + at_most_steps + 1, leak_mb, onset, native=native)
        found = [step for step in fast_replay(trace, UNLIMITED_MB).verdicts if step >= onset]
        assert found, seed
        assert found[0] <= onset + at_most_steps


def test_without_the_workers_own_reading_a_native_leak_is_found_later() -> None:
    onset = 300
    trace = fast_training(1, 0.02, 3000, 5.0, onset, native=True)
    own, missing = (
        next(step for step in fast_replay(trace, UNLIMITED_MB, own=each).verdicts if step >= onset)
        for each in ("true", "missing")
    )
    assert own < missing


@pytest.mark.parametrize("step_s", [0.002, 0.02])
def test_healthy_short_steps_trip_nothing(step_s: float) -> None:
    for seed in range(3):
        trace = fast_training(seed, step_s, 4000)
        assert fast_replay(trace, 1.5 * trace.peak_mb).trip is None
