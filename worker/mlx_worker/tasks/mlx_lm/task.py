"""Fine-tuning with mlx_lm: its configuration file, loader, datasets, adapters, optimizers, schedules and loss."""

import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, evaluate, iterate_batches
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers, print_trainable_parameters
from mlx_lm.utils import hf_repo_to_path, load, save_config

from mlx_supervisor import wire
from mlx_worker.checkpoint import durable_files
from mlx_worker.data import padding
from mlx_worker.memory import gradient_checkpointing
from mlx_worker.task import EvaluationContext, Task
from mlx_worker.tasks import fingerprint
from mlx_worker.tasks.mlx_lm import lora_keys
from mlx_worker.tasks.mlx_lm.config import FEATURES, LoraConfig
from mlx_worker.tasks.mlx_lm.data import TokenizedSamples, count_notes, load_all
from mlx_worker.tasks.mlx_lm.inputs import LoraInputs, read_inputs
from mlx_worker.tasks.mlx_lm.optimizing import OPTIMIZERS
from mlx_worker.tasks.mlx_lm.reports import start_reports

OPTIMIZER_CLASSES: dict[str, Any] = {
    "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon, "sgd": optim.SGD, "adafactor": optim.Adafactor,
}  # fmt: skip
EXPORT_HEADER_BYTES = 1024 * 1024
"""Room for the names of the arrays and for `adapter_config.json`."""
NETWORK = frozenset({"httpcore", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"})
"""Packages whose errors mean that the hub did not answer as it should."""
MESSAGE_SHOWN = 400
"""Characters of an error of mlx_lm's: it lists every parameter that a model lacks."""
NEVER_BYTES = 2**62
"""A threshold that no cache reaches: by default mlx_lm clears the cache after every batch of an evaluation."""
assert set(OPTIMIZER_CLASSES) == set(OPTIMIZERS)


def build(job: wire.Job, inputs: LoraInputs | None = None, *, connects: bool = True) -> Task:
    """Load everything that `mlx_lm.lora --train` loads. `inputs`: read already.

    Without `connects`, connect to no reporting service. Raises RefusedError.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as mlx_lm.lora does
    inputs = inputs or read_inputs(job)
    config, source = inputs.config, inputs.source
    values = config.values
    optimizer = _optimizer(config)
    print(f"loading {source}", flush=True)
    model, tokenizer = _load_model(config, source)
    data = load_all(config, tokenizer, inputs.files)
    found = [*lora_keys.notes(config, model), *count_notes(data, config)] if job.generation == 1 else []
    steps = values.iters // values.grad_accumulation_steps
    reports = start_reports(config, Path(job.run_dir), job.steps or steps, connects=connects)
    mx.random.seed(job.seed)
    _prepare_layers(config, model)
    print_trainable_parameters(model)
    if values.grad_checkpoint:
        gradient_checkpointing.checkpoint_layers(model)
    return Task(
        model=model,
        optimizer=optimizer,
        loss=default_loss,
        dataset=data.train,
        other_datasets={name: part for name, part in (("valid", data.valid), ("test", data.test)) if part is not None},
        lengths=data.train.sizes(),
        collate=lambda samples: padding.pad(samples, values.max_seq_length),
        evaluate=_evaluation(config, data.valid, values.val_batches),
        test=_test(config, data.test),
        milestone=_intermediate_save(config, model),
        milestone_every_steps=_updates(
            values, config.given.get("save_every") or 0
        ),  # not its default: checkpoints limit lost work
        report_update=reports.update,
        after_evaluation=reports.evaluation,
        evaluate_every_steps=_updates(values, values.steps_per_eval),
        export=lambda folder: export(folder, model, values),
        export_dir=config.resolve(values.adapter_path),
        export_bytes=EXPORT_HEADER_BYTES + sum(array.nbytes for array in _trainable(model).values()),
        batch_size=values.batch_size,
        accumulation=values.grad_accumulation_steps,
        steps=steps,
        fingerprint=data.digest,
        fixed=_fixed(config, source, Path(job.run_dir)),
        free=_free(config, data.valid_digest) | {"mlx_lm_compatible": job.task.mlx_lm_compatible},
        notes=[*_notes(config, job, data.valid is not None), *found, *reports.notes],
    )


def export(folder: Path, model: Any, values: Any) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` for `mlx_lm.load_adapters`, each atomically.

    Raises OSError; then the older adapters stay.
    """
    arrays = _trainable(model)
    settings = dict(vars(values))
    if values.fine_tune_type == "full":
        settings["lora_parameters"] = None
    temporary_config = folder / ".adapter_config.tmp.json"
    try:
        save_config(settings, temporary_config)
        write_adapters(folder / "adapters.safetensors", arrays)
        temporary_config.replace(folder / "adapter_config.json")
    except BaseException:
        temporary_config.unlink(missing_ok=True)
        raise


def _trainable(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def write_adapters(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write arrays as MLX does, through Python: its own writer does not say why it fails. Raises OSError."""
    durable_files.replace_file(path, lambda file: mx.save_safetensors(cast(BinaryIO, file), arrays))


def _updates(values: Any, iterations: int) -> int:
    """Iterations in updates, at least one; 0 stays 0."""
    return max(1, iterations // values.grad_accumulation_steps) if iterations else 0


def _intermediate_save(config: LoraConfig, model: Any) -> Callable[[int], None]:
    """A function that saves the adapters as mlx_lm does at `save_every`: as the newest, and by iteration number."""
    values = config.values
    folder = config.resolve(values.adapter_path)

    def save(step: int) -> None:
        iteration = step * values.grad_accumulation_steps
        copy = folder / f"{iteration:07d}_adapters.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            export(folder, model, values)
            with (folder / "adapters.safetensors").open("rb") as newest:
                durable_files.replace_file(copy, lambda file: shutil.copyfileobj(newest, file))
        except OSError as error:
            print(f"cannot save the adapters of iteration {iteration} to {folder}: {error}", file=sys.stderr)

    return save


def _optimizer(config: LoraConfig) -> Any:
    values = config.values
    name = values.optimizer.lower()
    try:
        rate = build_schedule(values.lr_schedule) if values.lr_schedule else values.learning_rate
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise config.refuse("lr_schedule", f"{type(error).__name__}: {error}") from error
    try:
        return OPTIMIZER_CLASSES[name](learning_rate=rate, **(values.optimizer_config.get(name) or {}))
    except (TypeError, ValueError) as error:
        raise config.refuse(f"optimizer_config.{name}", str(error)) from error


def _load_model(config: LoraConfig, source: str) -> tuple[Any, Any]:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    trust = {"trust_remote_code": config.values.trust_remote_code}
    try:
        try:
            return load(source, tokenizer_config=trust, **trust)[:2]
        except Exception as error:
            if not _is_of_network(error) or (folder := _downloaded(source)) is None:
                raise
            return load(folder, tokenizer_config=trust, **trust)[:2]
    except (RepositoryNotFoundError, HFValidationError) as error:
        text = f"{source} is neither a folder (there is no {config.resolve(source)}) nor a model on the hub: {error}"
        raise config.refuse("model", text) from error
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, LocalEntryNotFoundError) or _is_of_network(error):
            text = f"there is no folder {config.resolve(source)}, and the hub cannot be reached for {source}: {error}"
            raise config.refuse("model", text) from error
        message = " ".join(str(error).split())[:MESSAGE_SHOWN]
        text = f"{type(error).__name__}: {message}"
        functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if "load_tokenizer" in functions:
            raise config.refuse("model", f"cannot load the tokenizer of {source}: {text}") from error
        if isinstance(error, ValueError) and "load_weights" in functions:
            raise config.refuse("model", f"the weights in {source} do not fit its config.json: {message}") from error
        if isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError) or "safetensors" in str(error):
            raise config.refuse("model", f"cannot load {source}: {text}") from error
        raise  # for example, the device is out of memory


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in NETWORK or isinstance(error, ConnectionError | TimeoutError)


def _downloaded(source: str) -> str | None:
    """The folder of a model that was downloaded before; None without one."""
    try:
        return str(hf_repo_to_path(source))
    except Exception:  # not in the cache, or no cache
        return None


def _prepare_layers(config: LoraConfig, model: Any) -> None:
    values = config.values
    model.freeze()
    layers = len(model.layers)
    if values.num_layers > layers:
        whose = "" if "num_layers" in config.given else " (mlx_lm's default; -1 means all)"
        text = f"expected at most the model's {layers} layers, found {values.num_layers}{whose}"
        raise config.refuse("num_layers", text)
    if values.fine_tune_type == "full":
        for layer in model.layers[-max(values.num_layers, 0) :]:
            layer.unfreeze()
    else:
        lora_keys.check(config, model)
        try:
            linear_to_lora_layers(
                model, values.num_layers, values.lora_parameters, use_dora=values.fine_tune_type == "dora"
            )
        except (KeyError, ValueError) as error:
            raise config.refuse("lora_parameters", str(error)) from error
    if not tree_flatten(model.trainable_parameters()):
        full = values.fine_tune_type == "full"
        key, hint = ("num_layers", "") if full else ("lora_parameters.keys", f"; {lora_keys.described(model)}")
        raise config.refuse(key, f"selects no parameters to train{hint}")
    if values.resume_adapter_file is not None:
        _load_adapters(config, model)


def _load_adapters(config: LoraConfig, model: Any) -> None:
    """Load `resume_adapter_file` as mlx_lm does, but refuse arrays that do not fit: mlx_lm would ignore them."""
    path = config.resolve(config.values.resume_adapter_file)
    try:
        arrays: Any = mx.load(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise config.refuse("resume_adapter_file", f"cannot read {path}: {error}") from error
    if not isinstance(arrays, dict):
        raise config.refuse("resume_adapter_file", f"expected a file such as adapters.safetensors, found {path}")
    own = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    if not own.keys() & arrays.keys():
        text = f"none of the {len(arrays)} arrays in {path} belongs to this model with this fine_tune_type"
        raise config.refuse("resume_adapter_file", f"{text}; the first is {next(iter(arrays), 'missing')}")
    for name, array in arrays.items():
        if name in own and own[name].shape != array.shape:
            text = f"{name} in {path} has the shape {array.shape}, here it has {own[name].shape}"
            raise config.refuse("resume_adapter_file", f"{text}; was it made with another lora_parameters.rank?")
    model.load_weights(list(arrays.items()), strict=False)


def _evaluation(
    config: LoraConfig, samples: TokenizedSamples | None, count: int
) -> Callable[[Any, EvaluationContext], float] | None:
    """A function for the mean loss over `count` batches (-1: all); None without samples or batches."""
    if samples is None or count == 0:
        return None
    values = config.values
    whole = min(values.batch_size, len(samples))

    def run(model: Any, context: EvaluationContext) -> float:
        def batches(dataset: Any, **_options: Any) -> Iterator[tuple[mx.array, mx.array]]:
            # Batches as in the file, whatever the micro-batch: the losses of a run stay comparable.
            chosen_batches = iterate_batches(dataset, whole, values.max_seq_length)
            for batch, lengths in itertools.islice(chosen_batches, None if count == -1 else count):
                for start in range(0, whole, context.batch_size):
                    chosen = slice(start, start + context.batch_size)
                    yield batch[chosen], lengths[chosen]

        loss = evaluate(
            model, samples, whole, -1, values.max_seq_length, loss=_finite_loss, iterate_batches=batches,
            clear_cache_threshold=0 if context.clears_cache else NEVER_BYTES, progress_callback=context.progress,
        )  # fmt: skip
        return float(loss)

    return run


def _test(
    config: LoraConfig, samples: TokenizedSamples | None
) -> Callable[[Any, EvaluationContext], tuple[str, float]] | None:
    loss_of = _evaluation(config, samples, config.values.test_batches)
    if loss_of is None:
        return None

    def run(model: Any, context: EvaluationContext) -> tuple[str, float]:
        loss = loss_of(model, context)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows above
        return f"Test loss {loss:.3f}, Test ppl {perplexity:.3f}.", loss  # as mlx_lm words it

    return run


def _finite_loss(model: Any, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    loss, tokens = default_loss(model, batch, lengths)
    return mx.where(tokens > 0, loss, 0.0), tokens  # the mean is NaN if every token is masked


def _fixed(config: LoraConfig, source: str, run_dir: Path) -> dict[str, Any]:
    values = config.values
    folder = Path(source) if Path(source).is_dir() else hf_repo_to_path(source)
    description = folder / "config.json"
    full = values.fine_tune_type == "full"
    return {
        "weights": fingerprint.of_weights(folder, run_dir / fingerprint.CACHE_NAME),
        "model.config_sha256": hashlib.sha256(description.read_bytes()).hexdigest() if description.is_file() else "",
        "tokenizer": fingerprint.of_tokenizer(folder),
        "fine_tune_type": values.fine_tune_type,
        "lora_parameters": None if full else json.loads(json.dumps(values.lora_parameters)),
        "num_layers": values.num_layers,
        "resume_adapter_file": _adapter_file(config),
        **{name: config.given.get(name) for name in sorted(FEATURES)},
        "mask_prompt": values.mask_prompt,
        "max_seq_length": values.max_seq_length,
    }


def _adapter_file(config: LoraConfig) -> dict[str, str] | None:
    if config.values.resume_adapter_file is None:
        return None
    digest = fingerprint.of_file(config.resolve(config.values.resume_adapter_file))
    return {"path": config.values.resume_adapter_file, "sha256": digest}


def _free(config: LoraConfig, valid_digest: str) -> dict[str, Any]:
    values = config.values
    return {
        "lr_schedule": values.lr_schedule,
        "optimizer_config": values.optimizer_config.get(values.optimizer.lower()) or {},
        "grad_checkpoint": values.grad_checkpoint,
        "validation_data": valid_digest,
        "save_every": config.given.get("save_every") or 0,
        **{name: getattr(values, name) for name in ("val_batches", "steps_per_eval", "test", "test_batches")},
        "adapter_path": values.adapter_path,
    }


def _notes(config: LoraConfig, job: wire.Job, validates: bool) -> list[str]:
    notes, values = [], config.values
    seed = config.given.get("seed")
    if seed is not None and seed != job.seed:
        notes.append(f"{config.path.name}: seed {seed} is ignored; the settings' seed {job.seed} overrides it")
    if values.clear_cache_threshold:
        notes.append(
            f"{config.path.name}: clear_cache_threshold is ignored, as in mlx_lm.lora; memory.policy in the settings "
            "controls MLX's cache"
        )
    if values.grad_checkpoint and values.fine_tune_type != "full" and values.lora_parameters.get("dropout"):
        notes.append(
            f"{config.path.name}: grad_checkpoint with lora_parameters.dropout gives wrong gradients: MLX's backward "
            "pass draws a different dropout mask than its forward pass"
        )
    if values.fine_tune_type != "full" and "alpha" in values.lora_parameters:
        notes.append(f"{config.path.name}: lora_parameters.alpha is ignored, as in mlx_lm.lora, which uses scale")
    if not validates:
        notes.append("No validation: there are no validation samples (valid.jsonl).")
    return notes
