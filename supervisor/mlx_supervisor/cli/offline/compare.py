"""`mlx-supervisor compare A B`: what differs between two runs, in settings and in results."""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_supervisor.cli.offline import places, runs
from mlx_supervisor.cli.offline.places import Place, UsageError
from mlx_supervisor.cli.offline.runs import KnownRun
from mlx_supervisor.cli.text import loss, table
from mlx_supervisor.core.words import duration
from mlx_supervisor.journal.database import JournalError

PARTS = 8
"""Parts of the common steps whose mean losses are compared: single steps are noisy."""
VALIDATIONS_SHOWN = 12
SHOWN_LIMIT = 60
NAMED = 6
"""Runs of a file that an error lists."""
NOT_SETTINGS = frozenset(
    {"run", "run_dir", "results_of", "v", "generation", "telemetry", "checkpoint.mean_time_between_failures_s"}
    | {"settings_file", "batch.requested_size", "batch.requested_effective", "batch.from_task"}
    | {"checkpoint.tighter_steps", "batch.size", "batch.effective", "memory.gradient_checkpointing", "task.base_dir"}
)
"""Keys of a job that say where and when it ran, or that the supervisor chose; the recipe has the requested batch."""
_ORIGINS = "task.options_from."
_RATE = "learning_rate.learning_rate.initial"
"""As the recipe names the rate of an optimizer that has one."""


@dataclass(frozen=True)
class Side:
    """One of the two runs. `losses`, `validations`: by step; empty without a journal."""

    shown: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    losses: dict[int, float | None]
    validations: dict[int, float | None]


def compare(words: tuple[str, str], state_dir: Path | None, *, as_json: bool) -> int:
    """Print the differences. Returns the exit status."""
    first, second = (side_of(word, state_dir) for word in words)
    different = _differences(first.settings, second.settings)
    parts = mean_losses(first.losses, second.losses)
    apart = first_difference(first.losses, second.losses)
    common = sorted(first.validations.keys() & second.validations.keys())
    validated = [(step, first.validations[step], second.validations[step]) for step in common]
    if as_json:
        sides = [{"run": side.shown, **side.figures} for side in (first, second)]
        settings = {key: list(values) for key, values in different.items()}
        found = {"runs": sides, "settings": settings, "losses": parts, "first_difference": apart}
        found["validations"] = [{"step": step, "a": a, "b": b} for step, a, b in validated]
        print(json.dumps(found, indent=2))
        return 0
    print(f"A: {first.shown}\nB: {second.shown}\n")
    print("\n".join(_settings_lines(first, second, different)))
    pairs = {key: [side.figures[key] for side in (first, second)] for key in _LABELS}
    rows = [
        (_LABELS[key], *(_shown(key, value) for value in pair)) for key, pair in pairs.items() if pair != [None, None]
    ]
    print("\n".join(["", *table(("", "A", "B"), rows, left=(0,))]))
    print("\n".join(["", *_loss_lines(first, second, parts, apart)]))
    if validated:
        rows = [(str(step), loss(a), loss(b), _apart(a, b)) for step, a, b in validated[-VALIDATIONS_SHOWN:]]
        print("\n".join(["", *table(("validation at step", "A", "B", "B − A"), rows, left=(0,))]))
    return 0


def side_of(word: str, state_dir: Path | None) -> Side:
    """A run by its name, its settings file (`FILE`, `FILE:NAME`), its folder, its state folder or its summary.

    Raises UsageError, SettingsError.
    """
    path = Path(word).expanduser()
    if path.is_file() and path.suffix == ".json":
        path = path.absolute().parent
    if path.is_dir() and not places.is_state_dir(path):
        return _from_folder(path.absolute())
    file, colon, name = word.rpartition(":")
    if colon and not path.exists() and Path(file).expanduser().exists():
        return _from_run(runs.one([places.place_of(Path(file), state_dir)], [name]))
    given = places.find([word], state_dir)
    several = [] if given.names else runs.chosen(given.places, [])
    if len(several) > 1:
        forms = " or ".join(f"{word}:{run.name}" for run in several[:NAMED])
        raise UsageError(f"{word} has {len(several)} runs; name one: {forms}")
    return _from_run(runs.one(given.places, given.names))


def _from_folder(folder: Path) -> Side:
    """A run's folder, in its state folder or copied elsewhere."""
    place = Place(folder.parent.parent)
    if folder.parent.name == "runs" and places.is_state_dir(place.path):
        return _from_run(runs.one([place], [folder.name]))
    summary = runs.read_summary(folder)
    if summary is None:
        raise UsageError(f"{folder}: no run: it has neither a journal.db nor a summary.json")
    return Side(str(folder), settings_of(folder), _figures(summary, {}, None), {}, {})


_OF_HISTORY = ("loss", "trips", "restarts", "outcome", "replayed_steps", "goodput")


def _from_run(run: KnownRun) -> Side:
    past = run.history
    figures = dict(run.summary or {})
    records = list(figures.get("generations") or [])
    if past is not None:
        figures |= {key: getattr(past, key) for key in _OF_HISTORY}
        figures |= {"step": past.highest_step, "target_steps": past.target_steps}
        names = ("validation_loss", "best_validation_loss", "weights_sha256")
        figures |= {name: getattr(past, name, None) for name in names}
        records = [each.record for each in run.generations if each.record] or records
    figures["generations"] = records
    losses, totals, validations = {}, {}, {}
    if run.journal is not None:
        try:
            losses, totals = run.journal.losses(run.name), run.journal.step_totals(run.name)
            validations = run.journal.validations(run.name)
        except JournalError as error:
            print(f"{run.name}: {error}", file=sys.stderr)
    shown = f"{run.name} in {run.place.path}: {run.state}"
    return Side(shown, settings_of(run.folder), _figures(figures, totals, run.state), losses, validations)


_LABELS = {
    "step": "steps", "loss": "loss", "validation_loss": "validation loss",
    "best_validation_loss": "best validation loss", "tokens_per_second": "tokens/s",
    "seconds": "time", "restarts": "restarts", "trips": "trips", "replayed_steps": "replayed steps",
    "peak_footprint_mib": "peak memory, MiB", "goodput": "spent training", "weights_sha256": "weights",
}  # fmt: skip
"""The figures that are compared, and how a person reads them."""


def _figures(figures: Mapping[str, Any], totals: Mapping[int, Mapping[str, Any]], state: str | None) -> dict[str, Any]:
    records = figures.get("generations") or []
    seconds = sum(record.get("seconds") or 0.0 for record in records)
    lasted_s = sum(total["last_wall_s"] - total["first_wall_s"] for total in totals.values())
    tokens = sum(total["later_tokens"] for total in totals.values())
    names = (
        "step", "loss", "validation_loss", "best_validation_loss", "trips", "replayed_steps", "goodput",
        "weights_sha256",
    )  # fmt: skip
    return {
        "state": state or figures.get("outcome"),
        **{name: figures.get(name) for name in names},
        "tokens_per_second": round(tokens / lasted_s, 1) if tokens and lasted_s > 0 else None,
        "seconds": round(seconds, 1) if records else None,
        "restarts": figures.get("restarts"),
        "peak_footprint_mib": max((record.get("peak_footprint_mib") or 0.0 for record in records), default=None),
    }


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "?"
    if key == "seconds":
        return duration(value)
    if key == "goodput":
        return f"{value:.0%}"
    if key == "weights_sha256":
        return f"{value[:12]}…"
    return f"{value:.4f}" if key.endswith("loss") else f"{value:,.0f}"


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings with which the run last started, and the recipe in its newest checkpoint, by dotted key."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        accepted = folder / "accepted-job.json"  # a refused start leaves a job.json that trained nothing
        job = json.loads((accepted if accepted.exists() else folder / "job.json").read_bytes())
        found = {key: value for key, value in _flat(job) if key not in NOT_SETTINGS and not key.startswith(_ORIGINS)}
    for checkpoint in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            recipe = json.loads((checkpoint / "trainer.json").read_bytes())["recipe"]
            facts = dict(recipe["fixed"]) | dict(recipe["free"])
            for noise in ("checkpoint", "memory", "batch.size"):  # also in the job, or chosen by the supervisor
                facts.pop(noise, None)
            found |= {"learning_rate" if key == _RATE else key: value for key, value in _flat(facts)}
            break
    return found


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value)]


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted({*first, *second})
    pairs = {key: (first.get(key), second.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _settings_lines(first: Side, second: Side, different: Mapping[str, tuple[Any, Any]]) -> list[str]:
    unknown = [name for name, side in (("A", first), ("B", second)) if not side.settings]
    if unknown:
        return [f"Settings: not known of {' and '.join(unknown)} (no job.json and no checkpoint)"]
    if not different:
        return ["Settings: equal"]
    rows = [(key, *(_text(value) for value in pair)) for key, pair in different.items()]
    return table(("settings that differ", "A", "B"), rows, left=(0, 1, 2))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN_LIMIT else text[: SHOWN_LIMIT - 1] + "…"


def mean_losses(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> list[dict[str, Any]]:
    """Mean losses over equal steps: the common steps in up to 8 parts of the same length."""
    common = sorted(step for step in first.keys() & second.keys() if None not in (first[step], second[step]))
    size = -(-len(common) // PARTS)
    parts = []
    for start in range(0, len(common), size or 1):
        steps = common[start : start + size]
        means = [sum(side[step] or 0.0 for step in steps) / len(steps) for side in (first, second)]
        parts.append({"first_step": steps[0], "last_step": steps[-1], "a": means[0], "b": means[1]})
    return parts


def first_difference(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> int | None:
    """The first common step whose losses differ in any bit; None without one."""
    return next((step for step in sorted(first.keys() & second.keys()) if first[step] != second[step]), None)


def _apart(first: float | None, second: float | None) -> str:
    return "?" if first is None or second is None else f"{second - first:+.4f}"


def _loss_lines(first: Side, second: Side, parts: list[dict[str, Any]], apart: int | None) -> list[str]:
    if not parts:
        return ["Losses: no common steps in the journals"]
    if apart is None:
        return [f"Losses: equal in every bit at all {len(first.losses.keys() & second.losses.keys()):,} common steps"]
    rows = [
        (f"{part['first_step']}–{part['last_step']}", loss(part["a"]), loss(part["b"]), _apart(part["a"], part["b"]))
        for part in parts
    ]
    return [*table(("mean loss of steps", "A", "B", "B − A"), rows, left=(0,)), f"First difference at step {apart}."]
