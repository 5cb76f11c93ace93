"""The data of an mlx_lm task, tokenized by mlx_lm: files that `jsonl` read, or hub data sets."""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tuner.datasets import create_dataset, load_custom_hf_dataset, load_hf_dataset

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.config import LoraConfig
from mlx_worker.tasks.mlx_lm.jsonl import Format, Lines, read_lines, read_subsets

COUNT_LIMIT_S = 10.0
"""Counting before the first update ends after this time; what it tokenized is not tokenized again."""
TRY_LIMIT_S = 2.0
"""For so long the other samples are tokenized, too: a template may refuse any of them."""
SHORT_BYTES = 16
"""A sample with fewer bytes of text may have too few tokens."""
TEMPLATE_TOKENS = 128
"""Tokens that a chat template may add. A token has at least one byte: shorter samples are never cut."""


@dataclass(frozen=True)
class DataCounts:
    """What training makes of a subset's samples. `checked`: all, unless the time for counting ended.

    `truncated`: longer than `max_seq_length`; `tokens_cut`: what they lose together. `masked`: with `mask_prompt`, the
    prompt alone fills `max_seq_length`, so that nothing is learned. `empty`: messages without content. `longest`:
    tokens of the longest sample, `tokens`: of all after cutting; both None unless every sample was tokenized.
    """

    samples: int
    checked: int
    truncated: int
    tokens_cut: int
    masked: int
    empty: int
    longest: int | None = None
    tokens: int | None = None


class TokenizedSamples:
    """A dataset of `(tokens, prompt length)`, tokenized by mlx_lm at first use, then cached.

    Sequences are cut to `max_seq_length` here; mlx_lm would print a warning for each batch. `where` is the file, or the
    dataset's name. `empty`: how many samples have no content.
    """

    def __init__(self, where: Path | str, dataset: Any, max_seq_length: int, empty: int = 0) -> None:
        self.where = where
        self._dataset = dataset
        self._limit = max_seq_length
        self._empty = empty
        self._tokens: list[tuple[list[int], int] | None] = [None] * len(dataset)
        self._whole_lengths: dict[int, int] = {}  # of the samples that were cut
        self._sizes: list[int] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        sample = self._tokens[index]
        if sample is None:
            sample = self._tokens[index] = self._tokenize(index)
        return sample

    def sizes(self) -> list[int]:
        """Bytes of text in every sample: close enough to tokens for grouping, without tokenizing."""
        if self._sizes is None:
            self._sizes = [_text_bytes(self._dataset[index]) for index in range(len(self))]
        return self._sizes

    def count(self, *, everything: bool = False, limit_s: float = COUNT_LIMIT_S) -> DataCounts:
        """Count what training would cut or cannot learn from. Without `everything`, first the samples that may be
        concerned are tokenized, for at most `limit_s`. Raises RefusedError for samples that cannot be trained on.
        """
        end_s = time.monotonic() + limit_s
        truncated = tokens_cut = masked = tokens = longest = 0
        checked = len(self)
        for index, size in enumerate(self.sizes()):
            if not everything:
                if SHORT_BYTES < size <= self._limit - TEMPLATE_TOKENS:
                    continue
                if time.monotonic() > end_s:
                    checked = index
                    break
            kept, offset = self[index]
            whole = self._whole_lengths.get(index, len(kept))
            truncated += whole > len(kept)
            tokens_cut += whole - len(kept)
            masked += offset >= len(kept)
            tokens, longest = tokens + len(kept), max(longest, whole)
        self._try_all(TRY_LIMIT_S if limit_s > 0 else 0.0)
        if masked == len(self):
            raise RefusedError(
                f"{self.where}: with mask_prompt, no sample has anything to learn: every prompt fills max_seq_length "
                f"({self._limit} tokens), or every completion is empty; raise max_seq_length"
            )
        totals = {"tokens": tokens, "longest": longest} if everything else {}
        return DataCounts(len(self), checked, truncated, tokens_cut, masked, self._empty, **totals)

    def _try_all(self, limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        for index in range(len(self)):
            if time.monotonic() > end_s:
                break
            _ = self[index]

    def _tokenize(self, index: int) -> tuple[list[int], int]:
        try:
            tokens, offset = self._dataset.process(self._dataset[index])
            tokens = list(tokens)
        except Exception as error:  # the tokenizer's template may raise anything
            text = f"{type(error).__name__}: {error}"[:300]
            if "chat_template is not set" in text:
                text = (
                    "the model's tokenizer has no chat template, which prompts and messages need; take an "
                    "instruction-tuned model, or data with 'text'"
                )
            raise RefusedError(f"{self.where}:{index + 1}: cannot tokenize this line: {text}") from error
        if len(tokens) < 2:
            raise RefusedError(
                f"{self.where}:{index + 1}: expected at least 2 tokens, found {len(tokens)}; remove the sample"
            )
        if len(tokens) > self._limit:
            self._whole_lengths[index] = len(tokens)
        return tokens[: self._limit], offset


@dataclass(frozen=True)
class Data:
    """The datasets of a run. `digest`: SHA-256 of the training samples, by which a checkpoint identifies them.

    `valid_digest`: the same of the validation samples; "" without any.
    """

    train: TokenizedSamples
    digest: str
    valid: TokenizedSamples | None
    test: TokenizedSamples | None
    valid_digest: str = ""

    @property
    def subsets(self) -> dict[str, TokenizedSamples]:
        """The data sets by the name that a message gives their samples."""
        named = {"training": self.train, "validation": self.valid, "test": self.test}
        return {name: samples for name, samples in named.items() if samples is not None}


def load_all(config: LoraConfig, tokenizer: Any, files: dict[str, Lines] | None = None) -> Data:
    """Tokenizable data sets from `files`, read already or now, or from the hub. Raises RefusedError."""
    if files is None:
        files = read_subsets(config)
    if files is None:
        return _from_hub(config, tokenizer)
    found = {name: _samples(lines, tokenizer, config) for name, lines in files.items()}
    valid_digest = files["valid"].digest if "valid" in files else ""
    return Data(found["train"], files["train"].digest, found.get("valid"), found.get("test"), valid_digest)


def load(folder: Path, name: str, tokenizer: Any, config: LoraConfig) -> tuple[TokenizedSamples, str] | None:
    """The subset `name` (train, valid or test) and the SHA-256 of its file; None if the file is missing.

    Raises RefusedError that names file and line.
    """
    lines = read_lines(folder / f"{name}.jsonl", config)
    return None if lines is None else (_samples(lines, tokenizer, config), lines.digest)


def _samples(lines: Lines, tokenizer: Any, config: LoraConfig) -> TokenizedSamples:
    try:
        dataset = create_dataset(lines.rows, tokenizer, config.values)
    except ValueError as error:
        raise RefusedError(f"{lines.path}: {error}") from error
    samples = TokenizedSamples(lines.path, dataset, config.values.max_seq_length, len(lines.empty))
    _ = samples[0]  # a tokenizer without a chat template fails now, not at a later step
    return samples


def count_notes(data: Data, config: LoraConfig) -> list[str]:
    """Sentences about samples that are cut or teach nothing. Raises RefusedError for samples too short to train on."""
    notes = []
    for kind, samples in data.subsets.items():
        notes += _sentences(samples.count(), kind, config)
    return notes


def _sentences(counts: DataCounts, kind: str, config: LoraConfig) -> list[str]:
    limit = f"max_seq_length = {config.values.max_seq_length:,}"
    among = "" if counts.checked == counts.samples else f" (among the first {counts.checked:,}; more were not counted)"
    of = f"of {counts.samples:,} {kind} samples"
    sentences = []
    if counts.truncated:
        are, longer = ("is", "it loses") if counts.truncated == 1 else ("are", "they lose")
        sentences.append(
            f"{counts.truncated:,} {of} {are} longer than {limit}: {longer} {counts.tokens_cut:,} tokens{among}"
        )
    if counts.masked:
        sentences.append(
            f"{counts.masked:,} {of} {'teaches' if counts.masked == 1 else 'teach'} nothing: with mask_prompt, the "
            f"prompt alone fills {limit}{among}"
        )
    if counts.empty:
        sentences.append(f"{counts.empty:,} {of} {'has' if counts.empty == 1 else 'have'} no content in any message")
    return [f"{config.path.name}: {sentence}" if "max_seq_length" in sentence else sentence for sentence in sentences]


def _from_hub(config: LoraConfig, tokenizer: Any) -> Data:
    values = config.values
    custom = getattr(values, "hf_dataset", None)
    key, name = ("hf_dataset", "hf_dataset") if custom else ("data", values.data)
    try:
        subsets = load_custom_hf_dataset(values, tokenizer) if custom else load_hf_dataset(name, tokenizer, values)
    except MemoryError:
        raise
    except Exception as error:  # a data set's own builder may raise anything
        where = _hub_names(custom) if custom else name
        if "Unsupported data format" in str(error):
            prefix = "hf_dataset." if custom else ""
            features = ", ".join(f"{prefix}{feature}_feature" for feature in ("text", "chat", "prompt", "completion"))
            raise config.refuse(
                key, f"{where} has none of the columns that mlx_lm reads; name its own with {features}"
            ) from None
        raise config.refuse(key, f"cannot load {where}: {type(error).__name__}: {error!s:.400}") from error
    train, valid, test = (
        _hub_samples(f"{name} ({kind})", subset, config) if len(subset) else None
        for kind, subset in zip(("train", "valid", "test"), subsets, strict=True)
    )
    if train is None:
        raise config.refuse(key, f"{name} has no training samples")
    if values.test and test is None:
        raise config.refuse("test", f"{name} has no test samples")
    _ = train[0]
    valid_digest = "" if valid is None else _digest(subsets[1])
    return Data(train, _digest(subsets[0]), valid, test if values.test else None, valid_digest)


def _hub_samples(where: str, subset: Any, config: LoraConfig) -> TokenizedSamples:
    """The samples of a subset, every row checked, unless several data sets with their own columns make it up."""
    given = getattr(config.values, "hf_dataset", None)
    listed = given if isinstance(given, list) else [given]
    if len(listed) > 1:
        return TokenizedSamples(where, subset, config.values.max_seq_length)
    check = Format(where, config, listed[0] or None)
    for index in range(len(subset)):
        check.line(index + 1, subset[index])
    check.refuse_blank(len(subset))
    return TokenizedSamples(where, subset, config.values.max_seq_length, len(check.empty))


def _hub_names(given: Any) -> str:
    return " or ".join(str(one["path"]) for one in (given if isinstance(given, list) else [given]))


def _digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for index in range(len(rows)):
        digest.update(json.dumps(rows[index], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_text_bytes, parts))
