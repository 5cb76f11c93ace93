"""Planted bugs are found. `make simulate-bugs` prints how soon."""

import pytest
from tests.simulation.bugs import BUGS, SEEDS_AT_MOST, seed_that_finds

FAST_SEEDS = 150


@pytest.mark.parametrize("name", BUGS)
def test_found(name: str) -> None:
    assert seed_that_finds(name, range(FAST_SEEDS)) is not None, f"not in {FAST_SEEDS}; allowed are {SEEDS_AT_MOST}"
