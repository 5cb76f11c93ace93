"""The texts of the live display and the summary at the end of a run."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mlx_supervisor.cli.display import memory_text
from mlx_supervisor.cli.run import resume_command
from mlx_supervisor.cli.summary_text import print_summary
from mlx_supervisor.core.memory.growth import Growth

MIB = 2**20
LEAK = Growth(50.2 * MIB, {"arrays": 50.0 * MIB, "native": 0.2 * MIB, "cache": -3.0 * MIB}, True, 12.2, 130.0)


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (Growth(), ""),
        (Growth(0.0), ""),
        (Growth(-2.0 * MIB, {"arrays": -2.0 * MIB}), ""),
        (Growth(2.0 * MIB, {}, False, 455.0, 45.0), ", growth 2.0 MiB/step, limit in 455 steps (45 s)"),
        (LEAK, ", leak 50.2 MiB/step (arrays 50.0, native 0.2), limit in 12 steps (2m10s)"),
    ],
)
def test_growth_is_shown_as_far_as_it_is_known(growth: Growth, text: str) -> None:
    assert memory_text(1090 * MIB, 1700 * MIB, growth) == f"1,090 of 1,700 MiB{text}"


def summary(outcome: str, generations: int) -> dict[str, object]:
    record = {
        "batch_size": 4,
        "accumulation": 2,
        "first_step": 1,
        "last_step": 9,
        "seconds": 130.2,
        "ended": "signal 9",
    }
    return {
        "run": "night",
        "outcome": outcome,
        "reason": "SIGINT",
        "step": 9,
        "target_steps": 20,
        "loss": 2.5,
        "trips": 1,
        "replayed_steps": 0,
        "goodput": None,
        "checkpoint_stall_fraction": None,
        "weights_sha256": None,
        "generations": [record | {"generation": number + 1, "cause": "memory leak"} for number in range(generations)],
    }


def printed(outcome: str, generations: int) -> list[str]:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=200), summary(outcome, generations), Path("state/runs/night"), "resume it")
    return stream.getvalue().splitlines()


def test_the_command_that_resumes_can_be_pasted_into_a_shell() -> None:
    command = resume_command(Path("my runs/a.toml"), "night", Path("/tmp/state"))
    assert command == "mlx-supervisor run 'my runs/a.toml' night --state-dir /tmp/state"
    assert resume_command(Path("a.toml"), None, None) == "mlx-supervisor run a.toml"


def test_a_stopped_run_shows_its_generations_and_how_to_resume() -> None:
    lines = printed("stopped", 14)
    assert lines[1:3] == ["night: stopped at step 9 of 20: SIGINT.", "loss 2.5000, 1 trip, 0 steps replayed."]
    assert lines[3].split() == ["generation", "batch", "steps", "time", "peak", "MiB", "ended"]
    assert [line.split()[0] for line in lines[4:16]] == [str(number) for number in range(3, 15)]
    assert lines[4].split("  ")[-1] == "memory leak (signal 9)"
    assert "2m10s" in lines[4]
    assert lines[16] == "(2 earlier generations are in summary.json)"
    assert lines[17].startswith("Summary: state/runs/night/summary.json, ")
    assert lines[18] == "Resume with: resume it"


def test_a_run_without_a_generation_shows_no_table_and_a_failed_one_no_command() -> None:
    assert len(printed("failed", 0)) == 4
