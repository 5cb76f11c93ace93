"""The command line's options for a run: those of `mlx_lm.lora`, typed as there, and the supervisor's own."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mlx_supervisor.cli.request.exit_statuses import EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.settings.configuration import option
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.settings.sizes import parse_bytes


@dataclass(frozen=True)
class Option:
    """An option of mlx_lm.lora. `kind` bool: a switch. `lowest`: the smallest value allowed."""

    key: str
    kind: Any
    help: str
    lowest: int | None = None


MLX_LM = (
    Option("model", str, "The model: a local folder or a name on the hub."),
    Option("data", str, "A folder with train.jsonl, valid.jsonl and test.jsonl, or a data set's name on the hub."),
    Option("iters", int, "Iterations to train for.", 1),
    Option("batch_size", int, "Samples of a batch.", 1),
    Option("learning_rate", float, "The learning rate.", 0),
    Option("num_layers", int, "Layers to fine-tune, from the last; -1: all.", -1),
    Option("fine_tune_type", Literal["lora", "dora", "full"], "What is trained."),
    Option("optimizer", Literal["adam", "adamw", "muon", "sgd", "adafactor"], "The optimizer."),
    Option("mask_prompt", bool, "Leave the prompt out of the loss."),
    Option("max_seq_length", int, "The longest sample, in tokens; the rest is cut.", 2),
    Option("grad_checkpoint", bool, "Recompute activations: less memory, slower."),
    Option("grad_accumulation_steps", int, "Batches of one update.", 1),
    Option("adapter_path", str, "The folder for the finished adapters."),
    Option("save_every", int, "Also save the adapters every N iterations.", 0),
    Option("resume_adapter_file", str, "Adapters to begin with."),
    Option("val_batches", int, "Batches of a validation; -1: all.", -1),
    Option("steps_per_eval", int, "Iterations between two validations.", 1),
    Option("steps_per_report", int, "Iterations between two reports to the services of --report-to.", 0),
    Option("test", bool, "Evaluate the test set when training is complete."),
    Option("test_batches", int, "Batches of the test set; -1: all.", -1),
    Option("report_to", str, "Services that get reports, separated by commas."),
    Option("project_name", str, "The project's name in those services."),
    Option("seed", int, "Determines the order of the samples and the random numbers.", 0),
    Option("trust_remote_code", bool, "Trust the code that comes with the model."),
    Option("clear_cache_threshold", str, "Ignored, as in mlx_lm.lora."),
    Option("train", bool, "Has no effect: a run always trains."),
)
"""Every option of mlx_lm.lora but `--config`, which names the file."""


def takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a RunRequest, as one that typer reads: with FILE, NAME and all options."""
    own = list(inspect.signature(command).parameters.values())[1:]
    names = {each.name for each in own}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        kept = {name: given.pop(name) for name in names}
        try:
            request = _request(given)
        except SettingsError as error:
            typer.echo(error, err=True)
            raise typer.Exit(EXIT_WRONG_SETTINGS) from None
        command(request, **kept)

    parameters = [*_leading(), *own, *_supervisors(), *map(_parameter, MLX_LM)]
    signature = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters])
    vars(wrapped)["__signature__"] = signature
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _request(given: dict[str, Any]) -> RunRequest:
    """The request of the parsed command line; what is left in `given` are mlx_lm's options. Raises SettingsError."""
    file, config, name, named = (given.pop(key) for key in ("file", "config", "name", "run_name"))
    if file is not None and config is not None:
        raise SettingsError([f"--config: found {config} besides the file {file}; allowed: one of them"])
    if name is not None and named is not None:
        raise SettingsError([f"--name: found {named} besides the name {name}; allowed: one of them"])
    state_dir, limit = given.pop("state_dir"), given.pop("memory_limit")
    compatible = bool(given.pop("mlx_lm_compatible"))
    options = {key: value for key, value in given.items() if value is not None and value is not False}
    if "clear_cache_threshold" in options:
        try:
            options["clear_cache_threshold"] = parse_bytes(_digits(options["clear_cache_threshold"]))
        except ValueError as error:
            raise SettingsError([f"--clear-cache-threshold: allowed: {error}"]) from None
    source = config if file is None else file
    return RunRequest(source, named if name is None else name, state_dir, options, limit, compatible)


def _digits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _leading() -> list[inspect.Parameter]:
    file = "mlx_lm.lora's configuration file (YAML), or a settings file (TOML)."
    return [
        _of("file", Annotated[Path | None, typer.Argument(metavar="FILE", help=file)]),
        _of("name", Annotated[str | None, typer.Argument(metavar="NAME", help="The run, if the file has several.")]),
    ]


def _supervisors() -> list[inspect.Parameter]:
    folder = "Folder for checkpoints, logs and the journal."
    limit = 'Memory for the run: a share (0.7) or a size ("12 GiB"). Default: 0.8 of the machine\'s.'
    compatible = "Accumulate gradients as mlx_lm does: every batch counts equally, whatever its tokens."
    return [
        _of("config", Annotated[Path | None, typer.Option("-c", "--config", metavar="FILE", help="The same as FILE.")]),
        _of("run_name", Annotated[str | None, typer.Option("--name", metavar="NAME", help="The same as NAME.")]),
        _of(
            "state_dir",
            Annotated[Path | None, typer.Option(metavar="FOLDER", help=folder)],
        ),
        _of("memory_limit", Annotated[str | None, typer.Option(metavar="LIMIT", help=limit)]),
        _of("mlx_lm_compatible", Annotated[bool | None, typer.Option("--mlx-lm-compatible", help=compatible)]),
    ]


def _parameter(one: Option) -> inspect.Parameter:
    kind, text = one.kind, f"mlx_lm: {one.help}"
    if one.kind is bool:
        return _of(one.key, Annotated[bool | None, typer.Option(option(one.key), help=text)])
    shown = {str: "TEXT", int: "N", float: "NUMBER"}.get(kind)
    setting = typer.Option(option(one.key), min=one.lowest, metavar=shown, help=text)
    return _of(one.key, Annotated[kind | None, setting])


def _of(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
