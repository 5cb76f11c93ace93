"""`mlx-supervisor check`: what a run would do, examined without training. Nothing of the run is touched."""

import asyncio
import json
import sys
from pathlib import Path

from mlx_supervisor.cli.check import places, probe, text
from mlx_supervisor.cli.check.findings import Findings
from mlx_supervisor.cli.check.measuring import measure_sizes
from mlx_supervisor.cli.check.prediction import Bound
from mlx_supervisor.cli.request.exit_statuses import EXIT_COMPLETED, EXIT_INTERRUPTED, EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.core.words import size as shown
from mlx_supervisor.host.memory import machine_bytes
from mlx_supervisor.settings.schema import Settings, SettingsError
from mlx_supervisor.settings.to_policy import limit_bytes
from mlx_supervisor.wire.check import MeasureReport


def check(request: RunRequest, *, measures: bool, as_json: bool) -> int:
    """Examine, with `measures` also measure, and print. Returns the exit status (`EXIT_…`)."""
    try:
        settings, name = request.read()
        limit = limit_bytes(settings.runs[name], machine_bytes(), f"runs.{name}")
    except SettingsError as error:
        if as_json:
            print(json.dumps({"ok": False, "problems": str(error).splitlines()}))
        print(error, file=sys.stderr)
        return EXIT_WRONG_SETTINGS
    try:
        findings = asyncio.run(_find(settings, name, limit, measures=measures))
    except KeyboardInterrupt:
        print("Interrupted: nothing was changed.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if as_json:
        print(json.dumps(text.as_json(findings), allow_nan=False))
    elif findings.report is not None and findings.report.batch_size:  # otherwise only the problems say something
        print("\n".join(text.lines(findings)))
    for problem in findings.problems:
        print(problem, file=sys.stderr)
    if not findings.problems and not as_json:
        print(f"No problems found. Start it with: {request.command()}")
    return EXIT_WRONG_SETTINGS if findings.problems else EXIT_COMPLETED


async def _find(settings: Settings, name: str, limit: int, *, measures: bool) -> Findings:
    run = settings.runs[name]
    bound = Bound(limit, run.memory.soft_share)
    findings = Findings(name, settings.path, bound)
    if (problem := places.state_dir_problem(settings.state_dir)) is not None:
        findings.problems.append(problem)
    examined = await probe.examine(settings, name, limit)
    report = examined.report
    if report is None:
        tail = "".join(f"\n  {line}" for line in examined.output)
        short = "too little memory is available on this machine to load the run"
        ended = short if examined.short_of_memory else f"the worker ended without a report: {examined.ended}{tail}"
        findings.problems.append(f"{settings.path}: {ended}")
        return findings
    findings.report = report
    findings.problems += [f"{settings.path}: {each}" if _is_bare(each) else each for each in report.problems]
    if report.batch_size == 0:
        return findings
    findings.bound = bound = Bound(limit, run.memory.soft_share, report.device_limit_bytes)
    _disk(settings, name, findings)
    if report.held_bytes > bound.share * limit:
        findings.problems.append(
            f"memory.limit: the process holds {shown(report.held_bytes)} before the first update; found a limit of "
            f"{shown(limit)}; raise it"
        )
    elif measures:
        await _measure(settings, name, findings)
    return findings


def _is_bare(problem: str) -> bool:
    """Whether a problem begins with a key of the settings, rather than with a file."""
    return problem.startswith(("task.", "batch.", "steps ", "the effective batch", "Task."))


def _disk(settings: Settings, name: str, findings: Findings) -> None:
    report, kept = findings.report, settings.runs[name].checkpoint
    assert report is not None
    output = None if report.output is None else Path(report.output)
    count = kept.keep + int(kept.keep_best)
    try:
        findings.disk = places.needs(
            settings.run_dir(name), output, report.checkpoint_bytes, count, report.output_bytes
        )
    except OSError as error:
        findings.problems.append(f"{error.filename}: {error.strerror}")
    for need in findings.disk:
        if need.free_bytes < need.needed_bytes:
            findings.problems.append(
                f"{need.folder}: too little room on this disk: {shown(need.free_bytes)} free, "
                f"{shown(need.needed_bytes)} needed ({need.what}); free some, or choose another folder"
            )


async def _measure(settings: Settings, name: str, findings: Findings) -> None:
    report = findings.report
    assert report is not None
    accumulation = max(1, -(-report.effective_batch // report.batch_size))
    samples = report.data[0].samples if report.data else 0

    async def measure(size: int) -> probe.Probe[MeasureReport]:
        print(f"Measuring batch size {size} ...", file=sys.stderr, flush=True)
        return await probe.measure(settings, name, findings.bound.limit_bytes, size=size, effective=size * accumulation)

    at_most = max(1, samples // accumulation)
    findings.measured = found = await measure_sizes(measure, findings.bound, report.batch_size, at_most, accumulation)
    if found.problem:
        findings.problems.append(f"{settings.path}: {found.problem}")
    elif found.largest == 0:
        findings.warnings.append("Not even batch size 1 fits: the run would trip at once. Raise memory.limit.")
    elif report.batch_size > found.largest:
        findings.warnings.append(
            f"Batch size {report.batch_size} does not fit: expect a trip and a restart at half of it. "
            f"The largest that fits is {found.largest}."
        )
