"""How quantities are written for people."""

import pytest

from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import duration, growth_rate, sentence, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.5, "0.5 s"),
        (0.042, "0.04 s"),
        (2.54, "2.5 s"),
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


@pytest.mark.parametrize(
    ("mib", "text"),
    [(0.04, "0 MiB"), (165.3, "165.3 MiB"), (1700, "1,700 MiB"), (81559.26, "81,559.3 MiB"), (128 * 1024, "128 GiB")],
)
def test_a_size_is_in_mib_with_one_decimal_where_needed(mib: float, text: str) -> None:
    assert size(mib * MIB) == text


def test_growth_is_per_step() -> None:
    assert growth_rate(52.66 * MIB) == "52.7 MiB/step"


def test_a_sentence_has_a_capital_and_a_full_stop() -> None:
    assert sentence("used 2 MiB, limit 1 MiB") == "Used 2 MiB, limit 1 MiB."
