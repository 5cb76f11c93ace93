"""What `python -m mlx_worker JOB --check FILE` writes to FILE: the job without any training, or a few updates of it."""

import msgspec


class SubsetReport(msgspec.Struct, frozen=True, kw_only=True):
    """One set of samples. `stream`: it has no length, and `samples` are the first ones.

    `tokens` (after the cut) and `longest` (before it) are None where they can't be counted. `truncated` samples are
    longer than the limit and lose `cut_tokens` together. `empty` samples have no content, `masked` ones consist of
    their prompt alone: neither teaches anything.
    """

    name: str
    samples: int
    stream: bool = False
    tokens: int | None = None
    longest: int | None = None
    truncated: int = 0
    cut_tokens: int = 0
    empty: int = 0
    masked: int = 0


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """`problems`: why a run would be refused. Everything else is None or empty if it could not be found out.

    `resumes_at`: the step of the run's newest checkpoint, 0 without one. `held_bytes`: this process before its first
    update. `checkpoint_bytes`: weights and optimizer state of one checkpoint. `shapes`: of one collated micro-batch.
    `parameters`: with the `adapters` that mlx_lm adds.
    """

    problems: list[str]
    notes: list[str] = []
    model: str = ""
    architecture: str = ""
    parameters: int = 0
    adapters: int = 0
    trainable: int = 0
    optimizer: str = ""
    data: list[SubsetReport] = []
    shapes: list[str] = []
    batch_size: int = 0
    effective_batch: int = 0
    resumes_at: int = 0
    steps: int = 0
    evaluate_every_steps: int = 0
    output: str | None = None
    output_bytes: int = 0
    checkpoint_bytes: int = 0
    held_bytes: int = 0
    gradient_checkpointing: bool = False
    device: str = ""
    device_limit_bytes: int | None = None


class MeasureReport(msgspec.Struct, frozen=True, kw_only=True):
    """A few updates with the longest samples. `began_s`: when they began, by the clock of all processes,
    `time.monotonic`. `update_s`: of one update, without compilation. `tokens`: of one update.

    `peak_bytes`: MLX's highest active memory. `evaluated`: whether an evaluation ran too, `evaluated_all`: whether to
    its end. `saved`: whether a checkpoint's snapshot was held during updates.
    """

    problems: list[str]
    batch_size: int
    accumulation: int = 1
    began_s: float = 0.0
    update_s: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    evaluated: bool = False
    evaluated_all: bool = False
    saved: bool = False
