"""How quantities are written for people."""

import pytest

from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import (
    duration,
    growth_rate,
    loss_text,
    mebibytes,
    remaining,
    sentence,
    shortened,
    size,
    used_of,
    validation_text,
)


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (124, "2 min"),
        (3599, "1 h"),
        (4800, "1 h 20 min"),
        (86399, "1 d"),
        (76 * 3600, "3 d 4 h"),
    ],
)
def test_the_time_left_is_rounded_as_an_estimate_is(seconds: float, text: str) -> None:
    assert remaining(seconds) == text


@pytest.mark.parametrize(
    ("used_mib", "limit_mib", "text"),
    [
        (165.3, 165.0, "used 165.3 MiB, limit 165.0"),
        (165.04, 165.0, "used 165.04 MiB, limit 165.00"),
        (2300.2, 2200.0, "used 2,300 MiB, limit 2,200"),
        (165.0, 165.0, "used 165 MiB, limit 165"),
        (20_480.3, 20_480.0, "used 20,480 MiB, limit 20,480"),
    ],
)
def test_two_sizes_that_differ_look_different_below_10_gib(used_mib: float, limit_mib: float, text: str) -> None:
    assert used_of(used_mib * MIB, limit_mib * MIB) == text


def test_one_size_alone_is_whole() -> None:
    assert mebibytes(1700.4 * MIB) == ["1,700"]


@pytest.mark.parametrize(
    ("loss", "text"),
    [(2.30812, "2.308"), (2.3, "2.3"), (float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "-infinite")],
)
def test_a_loss_has_four_digits_and_a_name_where_it_is_no_number(loss: float, text: str) -> None:
    assert loss_text(loss) == text


def test_a_validation_names_the_best_step() -> None:
    assert validation_text(2.31, 40, 2.28, 30) == "2.31 at step 40 (best 2.28 at step 30)"
    assert validation_text(2.28, 30, 2.28, 30) == "2.28 at step 30 (best)"
    assert validation_text(float("nan"), 30, None, 0) == "NaN at step 30"


def test_a_long_text_is_cut_before_the_place_at_its_end() -> None:
    assert shortened("short (a.py:1)", 20) == "short (a.py:1)"
    assert shortened("x" * 50 + " (a.py:1 in f)", 40) == "x" * 25 + "… (a.py:1 in f)"
    assert shortened("x" * 50, 40) == "x" * 39 + "…"
    assert len(shortened("x " * 50 + "(" + "y" * 50 + ")", 40)) <= 40
