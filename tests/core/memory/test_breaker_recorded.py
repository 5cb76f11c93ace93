"""The breaker on recordings of healthy runs (bench/record_null.py), without and with added leaks."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.core.memory.traces import MB, report, sample
from tests.core.policies import memory_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.breaker import Breaker

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("null-*.json.gz"))
KIB_MB = 1024 / MB
STEPS = 5000
ONSET = STEPS // 2


@cache
def _recorded(path: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return recorded


def _played(
    path: Path, leak_mb: float = 0.0, onset: int = 0, native: bool = True, steps: int = STEPS
) -> tuple[list[str], list[int]]:
    """Texts of trips, and steps with a verdict, in the first `steps`."""
    recorded = _recorded(path)
    limit = recorded["limit_bytes"] if not leak_mb else 10**12
    breaker, trips, verdicts = Breaker(memory_policy(limit), 20), [], []
    breaker.begin_generation()
    phases = list(recorded["phases"])
    rows = zip(*(recorded["columns"][name][:steps] for name in _COLUMNS), strict=True)
    for step, (footprint, peak, active, cache_kib, tokens, milliseconds) in enumerate(rows):
        while phases and phases[0][0] <= step:
            _, phase, highest = phases.pop(0)
            breaker.phase(ev.Phase(phase))
            if highest:
                breaker.sample(sample(highest * KIB_MB))
        leaked = leak_mb * max(step - onset, 0)
        seen = [] if footprint is None else [breaker.sample(sample(kib * KIB_MB + leaked)) for kib in (peak, footprint)]
        stepped = report(
            step, active * KIB_MB + (0 if native else leaked), cache_kib * KIB_MB, milliseconds / 1000, tokens
        )
        seen.append(breaker.step(stepped, False))
        trips += [trip.text for trip in seen if trip is not None]
        if breaker.leaking:
            verdicts.append(step)
    return trips, verdicts


_COLUMNS = ("footprint_kib", "peak_kib", "active_kib", "cache_kib", "tokens", "milliseconds")


def test_there_are_recordings() -> None:
    assert len(FIXTURES) >= 2
    assert all(len(_recorded(path)["columns"]["tokens"]) == STEPS for path in FIXTURES)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_recorded_healthy_run_causes_no_trip_and_no_verdict(path: Path) -> None:
    recorded = _recorded(path)
    assert recorded["limit_bytes"] <= 1.5 * recorded["peak_bytes"]
    assert _played(path) == ([], [])


@pytest.mark.parametrize(
    ("leak_mb", "native", "at_most"),
    [(0.5, False, 450), (1.0, False, 280), (5.0, False, 65), (50.0, False, 30),
     (0.5, True, 600), (1.0, True, 500), (5.0, True, 90), (50.0, True, 30)],
)  # fmt: skip
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_leak_on_top_of_it_is_recognised(path: Path, leak_mb: float, native: bool, at_most: int) -> None:
    """Every fifth of these steps has no sample, which makes native memory, known by samples alone, take longer."""
    _, verdicts = _played(path, leak_mb, ONSET, native, steps=ONSET + at_most + 1)
    assert verdicts
    assert verdicts[0] >= ONSET
