"""How quantities are written for people."""

import pytest

from mlx_supervisor.core.words import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.5, "0.5 s"),
        (9.96, "10 s"),
        (45.2, "45 s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (3599.7, "1:00:00"),
        (8 * 3600, "8:00:00"),
        (30 * 3600 + 61, "30:01:01"),
    ],
)
def test_a_duration_is_written_in_the_unit_that_fits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
