"""The findings as lines, and as JSON."""

from typing import Any

import msgspec

from mlx_supervisor.cli.check.findings import Findings
from mlx_supervisor.cli.check.measuring import Measured
from mlx_supervisor.cli.check.prediction import RUN_OVER_PROBE, Point, Prediction, shown_sizes
from mlx_supervisor.cli.text import table
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.words import counted, duration, size
from mlx_supervisor.wire.check import CheckReport, SubsetReport

HEADINGS = ("batch size", "peak MiB", "of the limit", "per update", "samples/s", "")


def lines(findings: Findings) -> list[str]:
    """The report for people; problems are printed elsewhere."""
    found = [("run", f"{findings.name}, from {findings.path}")]
    report = findings.report
    if report is not None and report.batch_size:
        found += _of_report(report)
        found += [
            ("disk", f"{size(need.needed_bytes)} needed in {need.folder} ({need.what}), {size(need.free_bytes)} free")
            for need in findings.disk
        ]
        found.append(("memory", _memory(findings, report)))
    found += [("note", text) for text in findings.all_warnings]
    width = max(len(label) for label, _ in found)
    shown = [f"{label.ljust(width)}  {text}" for label, text in found]
    return shown + ([] if findings.measured is None else ["", *_measured_lines(findings.measured, findings)])


def _of_report(report: CheckReport) -> list[tuple[str, str]]:
    base = report.parameters - report.adapters  # mlx_lm's log counts these alone
    share = report.trainable / base if base else 0.0
    adapters = f" and {report.adapters:,} of adapters" if report.adapters else ""
    named = f"{report.model} ({report.architecture})" if report.model else report.architecture
    found = [
        ("model", f"{named}, {base:,} parameters{adapters}, {report.trainable:,} trained ({_percent(share)})"),
        *(("data", _subset(each)) for each in report.data),
    ]
    samples = 0 if not report.data or report.data[0].stream else report.data[0].samples
    epochs = report.steps * report.effective_batch / samples if samples else None
    micro = f"{report.batch_size} × {-(-report.effective_batch // report.batch_size)}"
    passes = "" if epochs is None else f" = {figure(epochs)} epoch" + ("" if figure(epochs) == "1" else "s")
    batch = f"{micro} (micro-batch × accumulation), {counted(report.steps, 'step')}{passes}, "
    found.append(("batch", f"{batch}{report.optimizer}; at most {', '.join(report.shapes)}"))
    if report.evaluate_every_steps:
        found.append(("evaluation", f"every {counted(report.evaluate_every_steps, 'step')}"))
    found += _resume(report)
    if report.output is not None:
        found.append(("output", f"{report.output}, {size(report.output_bytes)}; can be written"))
    return found


def _resume(report: CheckReport) -> list[tuple[str, str]]:
    """Where a start would resume; nothing where a start is refused."""
    if report.problems or not report.resumes_at:
        return []
    if report.resumes_at >= report.steps:
        return [("resume", f"the run is complete at step {report.resumes_at}: a start trains nothing")]
    return [("resume", f"from the checkpoint of step {report.resumes_at}")]


def figure(number: float) -> str:
    """Three digits, or all of a whole number: `0.125`, `12.5`, `12,500`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _subset(each: SubsetReport) -> str:
    words = [f"{each.name}: " + ("a stream, its first " if each.stream else "") + counted(each.samples, "sample")]
    if each.tokens is not None and each.longest is not None:
        words.append(f"{each.tokens:,} tokens, longest {each.longest:,}")
    if each.truncated:
        words.append(f"{each.truncated:,} cut, losing {each.cut_tokens:,} tokens")
    if each.empty:
        words.append(f"{each.empty:,} without content")
    if each.masked:
        words.append(f"{each.masked:,} with nothing to learn")
    return ", ".join(words)


def _memory(findings: Findings, report: CheckReport) -> str:
    words = [f"limit {size(findings.bound.limit_bytes)}, {size(report.held_bytes)} held before the first update"]
    if report.device_limit_bytes is not None:
        words.append(f"{size(report.device_limit_bytes)} of the device's own")
    if report.gradient_checkpointing:
        words.append("gradient checkpointing is on")
    if findings.measured is None:
        words.append("what an update needs: add --measure")
    return ", ".join(words)


def _measured_lines(found: Measured, findings: Findings) -> list[str]:
    rows = [_row(point, found) for point in points_of(found, findings)]
    rows += [(f"{each:,}", "over the limit", "", "", "", "measured") for each in sorted(found.over)]
    shown = table(HEADINGS, rows)
    if found.problem:
        return shown if rows else []
    share, limit = f"{100 * found.bound.share:.3g} %", size(found.bound.limit_bytes)
    if found.largest == found.at_most:
        shown.append(f"Every batch size up to {found.at_most}, as many samples as were read, fits {share} of {limit}.")
    elif found.largest:
        most = found.bound.share / RUN_OVER_PROBE
        shown.append(
            f"The largest batch size that fits is {found.largest}: its peak may be {100 * most:.1f} % of {limit}, "
            f"since a run needs up to {100 * (RUN_OVER_PROBE - 1):.1f} % more and has to stay below {share}."
        )
    shown.append("Measured with the longest samples, without MLX's cache, which takes only what is left.")
    return shown + [note for note in found.notes if note]


def points_of(found: Measured, findings: Findings) -> list[Point]:
    """The rows of the table."""
    prediction, report = found.prediction, findings.report
    if prediction is None or report is None:
        return []
    sizes = shown_sizes(report.batch_size, found.largest, found.at_most)
    points = [prediction.at(each) for each in sizes if each not in found.over]
    return [point for point in points if point is not None]


def _row(point: Point, found: Measured) -> tuple[str, ...]:
    share = f"{100 * point.peak_bytes / found.bound.limit_bytes:.0f} %"
    mark = "measured" if point.measured else "predicted"
    fits = "" if point.size <= found.largest else ", does not fit"
    rate = point.size * found.accumulation / point.update_s if point.update_s else 0.0
    update = duration(point.update_s)
    return (f"{point.size:,}", f"{point.peak_bytes / MIB:,.0f}", share, update, figure(rate), mark + fits)


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything, for programs. Sizes in bytes."""
    report = None if findings.report is None else msgspec.to_builtins(findings.report)
    result: dict[str, Any] = {
        "run": findings.name,
        "settings": str(findings.path),
        "ok": not findings.problems,
        "problems": findings.problems,
        "warnings": findings.all_warnings,
        "memory_limit_bytes": findings.bound.limit_bytes,
        "soft_share": findings.bound.share,
        "report": report,
        "disk": [
            {"folder": str(need.folder), "needed_bytes": need.needed_bytes, "free_bytes": need.free_bytes}
            for need in findings.disk
        ],
        "measured": None,
    }
    found = findings.measured
    if found is not None:
        result["measured"] = {
            "largest": found.largest,
            "at_most": found.at_most,
            "over_limit": found.over,
            "sizes": [_point_json(point, found) for point in points_of(found, findings)],
            "line": _line_json(found),
            "notes": found.notes,
        }
    return result


def _line_json(found: Measured) -> dict[str, Any] | None:
    """The line through the measured sizes; None with fewer than two."""
    if len(found.points) < 2:
        return None
    none, one = (Prediction(found.points).on_line(size) for size in (0, 1))
    per_sample = {
        "bytes_per_sample": one.peak_bytes - none.peak_bytes, "seconds_per_sample": one.update_s - none.update_s,
    }  # fmt: skip
    return {"base_bytes": none.peak_bytes, **per_sample}


def _point_json(point: Point, found: Measured) -> dict[str, Any]:
    return {
        "batch_size": point.size,
        "measured": point.measured,
        "peak_bytes": int(point.peak_bytes),
        "device_bytes": int(point.device_bytes),
        "seconds_per_update": point.update_s,
        "fits": point.size <= found.largest,
    }
