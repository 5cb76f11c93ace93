"""Rules across keys, checked once every type is right: contradictions, missing files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlx_supervisor.settings import validation
from mlx_supervisor.settings.paths import resolve
from mlx_supervisor.settings.schema import BatchSettings, MemorySettings, RunSettings

ARGS_LIMIT_BYTES = 256 * 1024
RESERVED_NAMES = frozenset({"all"})
"""`supervisorctl stop all` means every run."""
NAME_LENGTH = 64
_NAME = re.compile(rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_LENGTH - 1}}}", re.ASCII)


def check_name(name: str, path: str, folded: dict[str, str], problems: validation.Problems) -> None:
    if not _NAME.fullmatch(name):
        rule = "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        problems.add(path, f"the run name {validation.show(name)}", rule)
    if name.lower() in RESERVED_NAMES:
        problems.add(
            path, f"the run name {validation.show(name)}", "any other name", "supervisorctl all means every run"
        )
    other = folded.setdefault(name.casefold(), name)
    if other != name:
        hint = "on macOS both would share one folder"
        problems.add(path, f"a name that differs from {other} only by case", "another name", hint)


Report = Callable[[str, str, str], None]
"""Takes the key below the run, what was found, what is allowed."""


def check_run(run: RunSettings, path: str, base: Path, problems: validation.Problems) -> None:
    def report(key: str, found: str, allowed: str) -> None:
        problems.add(validation.join_dotted(path, key), found, allowed)

    _check_task(run, base, report)
    _check_plain(run.task.args, validation.join_dotted(path, "task.args"), problems)
    _check_plain(run.task.options, validation.join_dotted(path, "task.options"), problems)
    _check_batch(run.batch, report)
    _check_memory(run.memory, report)
    _check_drill(run, report)
    if not (run.checkpoint.automatic or run.checkpoint.every_steps or run.checkpoint.every_seconds):
        allowed = (
            "every_steps or every_seconds above 0, or neither key (overhead decides); "
            "without checkpoints a run cannot be resumed"
        )
        report("checkpoint", "no interval above 0", allowed)
    first_s, last_s = run.restart.backoff_s, run.restart.backoff_max_s
    if first_s > last_s:
        report("restart.backoff_s", f"{first_s:g}", f"at most restart.backoff_max_s, {last_s:g}")


def check_outputs(runs: Mapping[str, RunSettings], base: Path, problems: validation.Problems) -> None:
    """Refuse two runs that would write the same adapters: with one configuration file, or one option `adapter_path`.

    What the files themselves name is unknown here; the worker refuses that.
    """
    owners: dict[tuple[Path | None, Path | None], str] = {}
    for name, run in runs.items():
        task = run.task
        if task.kind != "mlx_lm":
            continue
        output = task.options.get("adapter_path")
        folder = _target(output, base) if isinstance(output, str) else None
        config = None if task.config is None or folder is not None else _target(task.config, base)
        other = owners.setdefault((config, folder), name)
        if other != name:
            key = "options.adapter_path" if folder is not None else "config"
            problems.add(
                validation.join_dotted(validation.join("runs", name), f"task.{key}"),
                f"the same as {validation.join('runs', other)}: both runs would write the same adapters",
                f'a different one, or options = {{ adapter_path = "adapters-{name}" }}',
            )


def _target(text: str, base: Path) -> Path | None:
    path = resolve(text, base)
    return None if path is None else path.resolve()


def _check_plain(table: dict[str, Any], path: str, problems: validation.Problems) -> None:
    before = problems.count
    validation.check_plain(table, path, problems)
    if problems.count == before and (size := len(msgspec.json.encode(table))) > ARGS_LIMIT_BYTES:
        problems.add(path, f"{size:,} bytes as JSON", f"at most {ARGS_LIMIT_BYTES:,} bytes")


_ENTRY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def _check_task(run: RunSettings, base: Path, report: Report) -> None:
    task = run.task
    other = "python" if task.kind == "mlx_lm" else "mlx_lm"
    if task.kind == "mlx_lm":
        if task.config is not None or not task.options:
            _check_config(task.config, base, report)
        unused = {"entry": task.entry is not None, "args": bool(task.args)}
    else:
        if task.entry is None or not _ENTRY.fullmatch(task.entry):
            found = "nothing" if task.entry is None else validation.show(task.entry)
            report("task.entry", found, '"package.module:function" for kind "python"')
        if run.steps is None:
            report("steps", "nothing", 'a whole number from 1 for kind "python"')
        unused = {"config": task.config is not None, "options": bool(task.options)}
        unused["mlx_lm_compatible"] = task.mlx_lm_compatible
    for key, present in unused.items():
        if present:
            report(f"task.{key}", f'a value with kind "{task.kind}"', f'no value; the key is for kind "{other}"')


def _check_config(config: str | None, base: Path, report: Report) -> None:
    allowed = 'the path of an mlx_lm configuration file for kind "mlx_lm"'
    if not config or not config.isprintable():
        report("task.config", "nothing" if not config else validation.show(config), allowed)
        return
    path = resolve(config, base)
    if path is None or not path.is_file():
        report("task.config", f"{validation.show(config)}, no file at {path}", allowed)


def _check_batch(batch: BatchSettings, report: Report) -> None:
    if batch.start is not None and batch.start < batch.minimum:
        report("batch.start", str(batch.start), f"at least batch.minimum, {batch.minimum}")
    if batch.size is None:
        if batch.accumulation != 1:
            report("batch.accumulation", str(batch.accumulation), "1, because batch.size is not set")
        if batch.start is not None:
            report("batch.start", str(batch.start), "no value, because batch.size is not set")
        return
    if batch.minimum > batch.size:
        report("batch.minimum", str(batch.minimum), f"at most batch.size, {batch.size}")
    if batch.start is not None and batch.start > batch.size:
        report("batch.start", str(batch.start), f"at most batch.size, {batch.size}")
    if batch.size * batch.accumulation >= 2**31:
        report("batch.accumulation", str(batch.accumulation), f"batch.size × batch.accumulation below {2**31:,}")


def _check_memory(memory: MemorySettings, report: Report) -> None:
    for key in ("clear_before_gradients", "clear_after_gradients"):
        if getattr(memory, key) and memory.policy != "always":
            report(f"memory.{key}", "true", 'false, or memory.policy = "always"')


def _check_drill(run: RunSettings, report: Report) -> None:
    drill = run.drill
    if drill.allocate_at_step is not None and drill.allocate_mib == 0:
        report("drill.allocate_mib", "0", "above 0, because drill.allocate_at_step is set")
    if drill.allocate_mib and drill.allocate_at_step is None:
        report("drill.allocate_at_step", "nothing", "a step, because drill.allocate_mib is set")
    if drill.leak_from_step and not drill.leak_mib_per_step:
        report("drill.leak_mib_per_step", "0", "above 0, because drill.leak_from_step is set")
    for key in ("leak_from_step", "allocate_at_step", "crash_at_step", "hang_at_step"):
        step = getattr(drill, key)
        if step is not None and run.steps is not None and step > run.steps:
            report(f"drill.{key}", str(step), f"at most steps, {run.steps}")
