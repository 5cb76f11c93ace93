"""Times, tables and the cells of a generation's row as plain text."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def iso(wall_s: float) -> str:
    """A Unix time as local time with its offset, ISO 8601."""
    return datetime.fromtimestamp(wall_s).astimezone().isoformat(timespec="seconds")


def moment(wall_s: float) -> str:
    """`25 Nov 20:49:03`, in local time."""
    return datetime.fromtimestamp(wall_s).strftime("%d %b %H:%M:%S")


def clock(wall_s: float) -> str:
    """`20:49:03`, with the date if it is not today's."""
    then = datetime.fromtimestamp(wall_s)
    return then.strftime("%H:%M:%S") if then.date() == datetime.now().date() else moment(wall_s)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Aligned lines: columns to the right, except those at the positions `left`."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (headings, *rows)
    ]


def loss(value: float | None) -> str:
    """`2.3734`; `?` if unknown."""
    return "?" if value is None else f"{value:.4f}"


def batch(record: Mapping[str, Any]) -> str:
    """A generation's micro-batch and accumulation, `4 × 2`; `?` for what is unknown."""
    size = record.get("batch_size")
    return "?" if size is None else f"{size} × {record.get('accumulation') or '?'}"


def steps(record: Mapping[str, Any]) -> str:
    """A generation's first and last step, `1–20`."""
    return "none" if record.get("first_step") is None else f"{record['first_step']}–{record['last_step']}"
