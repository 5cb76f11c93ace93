"""Shared by the benchmarks: a settings file in a temporary folder, the command line, a table, a JSON result."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

SUPPORT = Path(__file__).resolve().parent
BENCH = SUPPORT.parent
EXAMPLES = BENCH.parent / "examples"
SUPERVISOR = [sys.executable, "-m", "mlx_supervisor"]
MIB = 1024 * 1024


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """An argument parser with `--json`."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, default=BENCH / "results" / f"{name}.json", help="the file for the result")
    return result


@contextlib.contextmanager
def workplace(settings: str) -> Iterator[Path]:
    """A temporary folder with `settings.toml`. Its path is short, because it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "settings.toml").write_text(settings)
        yield folder


def llama(steps: int, batch: int, length: int, extra: str = "") -> str:
    """Settings of a run `bench`: the task of examples/first-run.toml without its drill."""
    return (
        f"[runs.bench]\nsteps = {steps}\nautostart = true\n"
        f'task = {{ kind = "python", entry = "first_run.stdlib_llama:build", args = {{ length = {length} }} }}\n'
        f"[runs.bench.batch]\nsize = {batch}\n{extra}"
    )


def with_examples(folder: Path) -> None:
    """Link the example's task into the settings file's folder, from which tasks are imported."""
    (folder / "first_run").symlink_to(EXAMPLES / "first_run")


def run(folder: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The summary of a complete `mlx-supervisor run`. Raises RuntimeError if it printed none."""
    command = [*SUPERVISOR, "run", str(folder / "settings.toml"), "--json", "--state-dir", str(folder / "state")]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    try:
        summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"no summary, exit code {done.returncode}: {done.stderr[-2000:]}") from None
    return summary


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column left-aligned, the others right-aligned."""
    cells = [list(header), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def _cell(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


SPREAD = ("min", "median", "p95", "p99", "max")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 95th and 99th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    p95, p99 = (ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in (95, 99))
    return dict(zip(SPREAD, (ordered[0], statistics.median(ordered), p95, p99, ordered[-1]), strict=True))


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result as JSON, with a description of the machine."""
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_supervisor": version("mlx-supervisor"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
    print(f"written to {path}")
