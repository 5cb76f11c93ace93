"""`mlx-supervisor init`: writes a settings file to start from."""

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_supervisor.cli.request.exit_statuses import EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.settings.configuration import UNNAMED, is_configuration, valid_name
from mlx_supervisor.settings.schema import Settings, SettingsError, TaskSettings
from mlx_supervisor.settings.validation import join
from mlx_supervisor.wire.owner import OWNER_FILE

_TEMPLATE = """\
# Settings of mlx-supervisor. Lines that begin with "#" are off; docs/settings.md has every key.
# Relative paths start at this file's folder.
{state_dir}
[{run}]
# steps = 1000                # updates in total; {origin}
# seed = 0                    # order of the samples and random numbers; {origin}
# deterministic = true        # CUDA: the same bits in every run, about 20 % slower
# stop_on_not_finite = false  # keep training after a NaN loss, as mlx_lm does
# autostart = true            # start together with `mlx-supervisor serve`

[{run}.task]
{task}
[{run}.batch]
# size = 4                    # samples in memory at once; {origin}
# accumulation = 2            # micro-batches per update; needs size
# minimum = 1                 # a memory trip never halves below this
# grow_after_steps = 200      # healthy updates before a halved micro-batch doubles again
# preserve_effective = false  # a halved micro-batch also halves the effective batch: another loss curve

[{run}.memory]
{limit}
# gradient_checkpointing = "always"  # less memory, slower; unset: only where the run would fail otherwise

[{run}.checkpoint]
# every_steps = 100           # unset: as often as costs at most 1 % of the time
# keep = 3                    # how many checkpoints are kept
# keep_best = true            # also keep the one with the lowest validation loss

[{run}.restart]
# max_without_progress = 3    # generations without a new checkpoint after which the run fails
# hang_timeout_s = 600        # seconds without a report that count as a hang; unset: derived
"""


_ADAPTER_PATH = re.compile(r"^adapter_path\s*:\s*(\"[^\"]+\"|'[^']+'|[^\s#]+)", re.MULTILINE)
_SKELETON = """\
kind = "mlx_lm"
config = "lora.yaml"          # your configuration file of mlx_lm.lora
# For your own training loop, instead of the two lines above (docs/python-task.md); it also needs `steps`:
# kind = "python"
# entry = "my_task:build"     # "module:function" beside this file
# args = { layers = 4 }       # arguments of the function
"""
_LIMIT = '# limit = "18 GiB"            # a size or a share of the machine\'s memory; unset: 0.8'


def write_settings(request: RunRequest, output: Path) -> int:
    """Write the settings file and print what to do next. Returns the exit status: 2 when nothing was written."""
    output = output.expanduser()
    try:
        request, folder = _with_own_adapters(request, output)
        text = settings_text(request, output)
        _write_new(output, text)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_SETTINGS
    print(f"Wrote {output}. Run it with: {RunRequest(output).command()}")
    if request.file is not None:
        print(f"That is a new run: it does not continue a run of {request.file}, and does not overwrite its adapters.")
    if folder:
        print(f"Its own adapters go to {folder}.")
    return 0


def settings_text(request: RunRequest, output: Path) -> str:
    """The settings for what `mlx-supervisor run` does with this request; only values other than defaults are active.

    Without a file and options: a skeleton to complete, with both kinds of task. Raises SettingsError.
    """
    if request.file is not None and not is_configuration(request.file):
        raise SettingsError(["allowed: a configuration file of mlx_lm.lora, NAME.yaml or NAME.yml"], request.file)
    if request.file is None and not request.options:
        run, task, limit = join("runs", valid_name(request.name or UNNAMED)), _SKELETON, None
        origin = "the configuration file"
    else:
        settings, name = request.read()
        run, task = join("runs", name), _task(settings.runs[name].task, output)
        limit = None if request.memory_limit is None else settings.runs[name].memory.limit
        origin = "mlx_lm" if request.file is None else request.file.name
    return _TEMPLATE.format(
        run=run,
        task=task,
        origin=f"unset: {origin} decides",
        state_dir="" if request.state_dir is None else f"state_dir = {_toml(str(request.state_dir.absolute()))}\n",
        limit=_LIMIT if limit is None else f"limit = {_toml(limit)}",
    )


def _task(task: TaskSettings, output: Path) -> str:
    lines, options = ['kind = "mlx_lm"'], dict(task.options)
    beside = task.config is None or Path(task.config).parent == output.absolute().parent
    if "adapter_path" in options and beside:  # else it may be read as a folder beside the configuration file
        options["adapter_path"] = _relative(Path(options["adapter_path"]), output)
    if task.config is not None:
        lines.append(f"config = {_toml(_relative(Path(task.config), output))}")
    active = "" if options else "# "
    lines.append(f"{active}options = {_toml(options or {'iters': 200})}  # keys of mlx_lm.lora; they override the file")
    if task.mlx_lm_compatible:
        lines.append("mlx_lm_compatible = true")
    return "\n".join(lines) + "\n"


def _with_own_adapters(request: RunRequest, output: Path) -> tuple[RunRequest, str]:
    """The request with a new folder for the adapters, and that folder, if the run that it names has delivered some."""
    if not (request.options if request.file is None else is_configuration(request.file)):
        return request, ""
    settings, name = request.read()
    taken = next((folder for folder in _outputs(request, settings, name, output) if _is_taken(folder)), None)
    if taken is None:
        return request, ""
    free = next(path for number in itertools.count(2) if not (path := _numbered(taken, number)).exists())
    options = {**request.options, "adapter_path": str(free)}
    return replace(request, name=name, options=options), _relative(free, output)


def _outputs(request: RunRequest, settings: Settings, name: str, output: Path) -> Iterator[Path]:
    """Folders to which the new settings' run may write its adapters, and that of the run which they are made from."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        summary = json.loads((settings.run_dir(name) / "summary.json").read_bytes())
        yield Path(summary["exported_to"])
    path = Path(str(settings.runs[name].task.options.get("adapter_path") or _configured(request.file)))
    beside = Path.cwd() if request.file is None else request.file.absolute().parent
    for base in (beside, output.absolute().parent, Path.cwd()):
        yield Path(os.path.normpath(base / path.expanduser()))


def _configured(file: Path | None) -> str:
    """The folder for adapters in a configuration file, else mlx_lm's default."""
    if file is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found := _ADAPTER_PATH.search(file.read_text(encoding="utf-8")):
                return found[1].strip("\"'")
    return "adapters"


def _is_taken(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(path.name != OWNER_FILE for path in folder.iterdir())
    return False


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number}")


def _relative(path: Path, output: Path) -> str:
    """A path as the settings file names it: relative to its folder where that is below it."""
    folder = output.absolute().parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are the same in TOML


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet; its folder is made. Raises SettingsError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise SettingsError(["the file exists and is kept; choose another with -o FILE"], path) from None
    except OSError as error:
        raise SettingsError([f"cannot be written: {error.strerror}"], path) from None
