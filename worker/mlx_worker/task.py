"""The interface between a task (yours, or the built-in mlx_lm one) and the training loop.

A python task is a function that builds a `Task`:

    # train_digits.py, next to the settings file with: entry = "train_digits:build", args = {hidden = 64}
    from mlx_worker.task import Task

    def build(hidden: int, seed: int) -> Task:
        model = Network(hidden)
        return Task(
            model=model,
            optimizer=optim.AdamW(learning_rate=1e-3),
            loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"),
            dataset=samples,                                   # anything with len() and [index]
            collate=lambda chosen: (mx.stack([x for x, _ in chosen]), mx.array([y for _, y in chosen])),
        )

`build` is called with the settings' `args`, and with `seed` if it has a parameter of that name. All random
generators (MLX, Python, numpy) are seeded before. The folder of the settings file is first on `sys.path`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Samples(Protocol):
    """A dataset of `len(dataset)` samples; the same index always gives the same sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class IndexedSamples(Protocol):
    """A dataset without a length, read in the order 0, 1, 2, …; IndexError ends an epoch."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluation is given besides the model.

    Call `progress()` after every batch: it reports to the supervisor that the run is alive, and ends the evaluation
    (by an exception) when a stop was requested. `batch_size`: the current micro-batch. `clears_cache`: whether the
    memory policy clears MLX's cache after every batch.
    """

    batch_size: int
    progress: Callable[[], None]
    clears_cache: bool = False


@dataclass(frozen=True)
class Update:
    """One completed optimizer update. `total_tokens` counts from the start of the run.

    `loss`: NaN also for an update without a token to learn (`tokens` is 0 then), which never ends the run.
    `metrics`: the loss's own figures, and `grad_norm` if the gradients are clipped; None: not a finite number.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    total_tokens: int
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(kw_only=True)
class Task:
    """Everything the loop needs. Only the first five are required.

    `loss(model, *arrays)` returns the scalar mean of a micro-batch, weighted by its number of samples, or
    `(scalar mean, weight)`, for example with the number of tokens. A dict of metrics may come last, as in
    `(scalar mean, {"accuracy": accuracy})`: at most 16 scalars, averaged like the loss, and reported.
    `dataset`: with len() and [index], it is shuffled. With [index] alone it is read in order. Any other iterable is a
    stream: `iter(dataset)` is called for every epoch, after `dataset.set_epoch(epoch)` if it has that. A stream with
    `state_dict()` and `load_state_dict(state)` restores its own position; otherwise a resumed run skips what it used.
    `collate(samples)` makes the tuple of arrays that `loss` gets after the model.
    `evaluate(model, context)` returns a number to report, or `(number, metrics)`; called every `evaluate_every_steps`
    updates (0: never), before the first and after the last. It runs in evaluation mode; the random generators are
    restored afterwards.
    `export(folder)` writes the result for others to use, once, at completion; `export_dir` defaults to `export` in
    the run's folder; in another one, --fresh overwrites what a former run wrote. `export_bytes`: its size, if known:
    room for it is checked before the first update.
    `batch_size`, `accumulation`, `steps`: used where the settings give none.
    `lengths`: a whole number for every sample that grows with its cost. Samples of similar length then go into one
    update, so that less is padded; the order is still fixed by the seed, and every epoch holds every sample once.
    `milestone(step)` is called every `milestone_every_steps` updates (0: never), with the model after that update,
    to write files. `after_update(update)` is called after every update and sees the model of that update: the next one
    waits for it. `report_update(update)` does not make it wait, so the model may be ahead: use it only to report.
    `after_evaluation(step, loss, seconds)` is called after every evaluation. A restart may repeat a step.
    `test(model, context)` returns a sentence to report, or `(sentence, loss)`; called once at completion, like an
    evaluation.
    `compile`: False for a loss that cannot be traced by `mx.compile` (it reads values, or changes Python state).
    `max_grad_norm`: clip the gradients of every update to this global norm. `ema_decay`: keep an exponential moving
    average of the weights, which evaluations, `test`, `milestone` and `export` see in the model. The settings' keys of
    the same names replace both.
    `state()` returns what your code must keep across restarts: None, numbers, text, bytes, lists, dicts and mx.arrays.
    It is saved with every checkpoint; `load_state(state)` gets it back before training. Set both or neither.
    `checkpoint_gradients()` makes the model drop activations and compute them again in the backward pass; called once,
    before training, if the settings or the escalation ladder turn it on. Without this function it is done as in mlx_lm,
    if `model.layers` allows it.
    `other_datasets`: other sets of samples by name, for example "valid": `mlx-supervisor check` counts them.
    `fingerprint`: identifies the data; a checkpoint made with other data is refused.
    `fixed`, `free`: facts kept in the checkpoint; at resume, a change to `fixed` is refused, to `free` reported.
    `notes`: sentences for the person who started the run.
    """

    model: Any
    optimizer: Any
    loss: Callable[..., Any]
    dataset: Samples | IndexedSamples | Iterable[Any]
    collate: Callable[[list[Any]], Any]
    evaluate: Callable[[Any, EvaluationContext], Any] | None = None
    evaluate_every_steps: int = 0
    export: Callable[[Path], None] | None = None
    export_dir: Path | None = None
    export_bytes: int = 0
    batch_size: int | None = None
    accumulation: int = 1
    steps: int | None = None
    lengths: Sequence[int] | None = None
    milestone: Callable[[int], None] | None = None
    milestone_every_steps: int = 0
    after_update: Callable[[Update], None] | None = None
    report_update: Callable[[Update], None] | None = None
    after_evaluation: Callable[[int, float, float], None] | None = None
    test: Callable[[Any, EvaluationContext], str | tuple[str, float]] | None = None
    compile: bool = True
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    state: Callable[[], Any] | None = None
    load_state: Callable[[Any], None] | None = None
    checkpoint_gradients: Callable[[], None] | None = None
    other_datasets: dict[str, Samples] = field(default_factory=dict)
    fingerprint: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
