"""The footprint at the end of steps that have no sample of their own."""

from collections.abc import Iterable
from dataclasses import replace

from tests.core.memory.traces import MB, report, sample

from mlx_supervisor.core.memory.step_ends import GAP_SAMPLES, StepEnds


def _ends(steps: Iterable[tuple[float, float | None]]) -> list[float | None]:
    """MB at the ends of steps, from the own reading (0: missing) and the sample of each, both in MB."""
    ends, found = StepEnds(), []
    for step, (own_mb, sample_mb) in enumerate(steps):
        reported = replace(report(step), process_bytes=int(own_mb * MB))
        leader = ends.leader_bytes(reported, None if sample_mb is None else sample(sample_mb, 40))
        found.append(None if leader is None else leader / MB)
    return found


def test_without_an_own_reading_only_samples_count() -> None:
    assert _ends([(0, 1000), (0, None), (0, 1010)]) == [960, None, 970]


def test_between_samples_the_own_reading_moves_and_the_sample_sets_the_level() -> None:
    assert _ends([(500, None), (510, 1000), (530, None), (550, None)]) == [None, 960, 980, 1000]


def test_memory_that_only_lives_within_a_step_does_not_count() -> None:
    assert _ends([(500, 1000), (500, 1300), (500, None)]) == [960, 960, 960]


def test_a_stuck_reading_follows_the_samples() -> None:
    found = _ends([(500, 1000 + 10 * step) for step in range(20)])
    assert found[-1] == 960 + 10 * (20 - GAP_SAMPLES)


def test_a_reading_that_grows_alone_does_not_count() -> None:
    assert _ends([(500 + 10 * step, 1000) for step in range(20)])[-1] == 960
