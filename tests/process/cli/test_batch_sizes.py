"""Which batch size `check --measure` names, from few measurements."""

import asyncio
from pathlib import Path

import pytest

from mlx_supervisor.cli.check.findings import Findings
from mlx_supervisor.cli.check.measuring import Measured, measure_sizes
from mlx_supervisor.cli.check.prediction import RUN_OVER_PROBE, Bound, Point, Prediction, shown_sizes
from mlx_supervisor.cli.check.probe import Probe
from mlx_supervisor.cli.check.text import figure, lines
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.wire.check import CheckReport, MeasureReport

BASE_MIB, SAMPLE_MIB = 100, 20


def needed_mib(size: int) -> int:
    return BASE_MIB + SAMPLE_MIB * size


class Machine:
    """Answers measurements as a worker whose memory is linear in the batch size; `limit_mib` kills it."""

    def __init__(self, limit_mib: float, problem: str = "", compiler_mib: int = 0) -> None:
        self.limit_mib, self.problem, self.compiler_mib = limit_mib, problem, compiler_mib
        self.sizes: list[int] = []

    async def measure(self, size: int) -> Probe[MeasureReport]:
        self.sizes.append(size)
        problems = [self.problem] if self.problem else []
        report = MeasureReport(
            problems=problems, batch_size=size, began_s=10.0, update_s=0.1 * size, peak_bytes=MIB, saved=True
        )
        needed = needed_mib(size) + (self.compiler_mib if len(self.sizes) == 1 else 0)
        killed = needed > self.limit_mib
        samples = [(1.0, 5 * MIB), (11.0, needed * MIB)]
        return Probe(None if killed else report, samples, killed, False, "exit code 0", [])

    def find(self, *, requested: int = 4, at_most: int = 1000) -> Measured:
        bound = Bound(int(self.limit_mib * MIB), 0.97)
        return asyncio.run(measure_sizes(self.measure, bound, requested, at_most))


@pytest.mark.parametrize("limit_mib", [130, 150, 190, 300, 1000, 4321])
def test_the_size_named_fits_and_the_next_does_not(limit_mib: int) -> None:
    found = Machine(limit_mib).find()
    usable_mib = 0.97 * limit_mib / RUN_OVER_PROBE
    assert needed_mib(found.largest) <= usable_mib < needed_mib(found.largest + 1)


def test_the_size_named_was_measured_and_so_was_the_requested_one() -> None:
    machine = Machine(1000)
    found = machine.find(requested=7)
    assert machine.sizes == [1, 2, 4, found.largest, 7]


def test_nothing_larger_is_measured_once_a_size_does_not_fit() -> None:
    machine = Machine(130)
    assert machine.find(requested=8).largest == 1
    assert machine.sizes == [1, 2]


@pytest.mark.parametrize("compiler_mib", [10, 90])
def test_a_measurement_that_a_compiler_disturbed_is_repeated(compiler_mib: int) -> None:
    machine = Machine(1000, compiler_mib=compiler_mib)
    assert machine.find(requested=2).largest == Machine(1000).find(requested=2).largest
    assert machine.sizes[:4] == [1, 2, 4, 1]


def test_a_limit_below_the_smallest_batch_leaves_none() -> None:
    found = Machine(110).find()
    assert (found.largest, found.over) == (0, [1])


def test_a_line_that_misleads_is_corrected_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "needed_mib", lambda size: 100 + 10 * size + (40 * (size - 4) if size > 4 else 0))
    machine = Machine(500)
    found = machine.find(requested=2)
    assert found.largest in machine.sizes
    assert RUN_OVER_PROBE * needed_mib(found.largest) <= 0.97 * 500 < RUN_OVER_PROBE * needed_mib(found.largest + 2)


def test_the_data_set_bounds_the_batch() -> None:
    machine = Machine(10_000)
    assert machine.find(at_most=3).largest == 3
    assert max(machine.sizes) <= 3


def test_an_error_of_the_task_ends_the_measurements() -> None:
    machine = Machine(1000, problem="TypeError: the loss")
    assert machine.find().problem == "TypeError: the loss"
    assert machine.sizes == [1]


def test_a_devices_own_memory_bounds_the_batch_too() -> None:
    bound = Bound(10_000 * MIB, 0.97, device_limit_bytes=64 * MIB)
    points = [Point(size, 0, size * 8 * MIB, 0.1) for size in (1, 2, 4)]
    assert Prediction(points).largest(bound, 100) == 8


@pytest.mark.parametrize(
    ("number", "text"), [(0.1254, "0.125"), (1.0, "1"), (99.97, "100"), (1520.4, "1,520"), (1e6, "1,000,000")]
)
def test_a_figure_is_readable_at_any_size(number: float, text: str) -> None:
    assert figure(number) == text


def test_the_sentence_on_the_largest_size_agrees_with_the_shares_of_the_table() -> None:
    machine = Machine(500)
    found = machine.find()
    report = CheckReport(problems=[], batch_size=4, effective_batch=4)
    findings = Findings("night", Path("a.toml"), found.bound, report=report, measured=found)
    sentence = next(line for line in lines(findings) if line.startswith("The largest"))
    most = 97 / RUN_OVER_PROBE
    assert f"its peak may be {most:.1f} % of 500 MiB" in sentence
    prediction = found.prediction
    assert prediction is not None
    shares = [prediction.on_line(size).peak_bytes / MIB / 5 for size in (found.largest, found.largest + 1)]
    assert shares[0] <= most < shares[1]


def test_the_table_ends_after_the_first_size_that_does_not_fit() -> None:
    assert shown_sizes(4, 5, 100) == [1, 2, 4, 5, 6, 8]
    assert shown_sizes(16, 5, 100) == [1, 2, 4, 5, 6, 8, 16, 32]
    assert shown_sizes(4, 0, 100) == [1, 2, 4, 8]
