"""The data of an mlx_lm task: jsonl files, checked line by line before training, or hub datasets; mlx_lm tokenizes."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tuner.datasets import create_dataset, load_custom_hf_dataset, load_hf_dataset

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.config import LoraConfig


class TokenizedSamples:
    """A dataset of `(tokens, prompt length)`, tokenized by mlx_lm at first use, then cached.

    Sequences are cut to `max_seq_length` here; mlx_lm would print a warning for each batch. `where` is the file, or the
    dataset's name.
    """

    def __init__(self, where: Path | str, dataset: Any, max_seq_length: int) -> None:
        self.where = where
        self._dataset = dataset
        self._limit = max_seq_length
        self._tokens: list[tuple[list[int], int] | None] = [None] * len(dataset)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        sample = self._tokens[index]
        if sample is None:
            sample = self._tokens[index] = self._tokenize(index)
        return sample

    def sizes(self) -> list[int]:
        """Bytes of text in every sample: close enough to tokens for grouping, without tokenizing."""
        return [_text_bytes(self._dataset[index]) for index in range(len(self))]

    def _tokenize(self, index: int) -> tuple[list[int], int]:
        try:
            tokens, offset = self._dataset.process(self._dataset[index])
            tokens = list(tokens)
        except Exception as error:  # the tokenizer's template may raise anything
            text = f"{type(error).__name__}: {error}"
            raise RefusedError(f"{self.where}:{index + 1}: cannot tokenize this line: {text:.300}") from error
        if len(tokens) < 2:
            raise RefusedError(f"{self.where}:{index + 1}: expected at least 2 tokens, found {len(tokens)}")
        return tokens[: self._limit], offset


@dataclass(frozen=True)
class Data:
    """The datasets of a run. `digest`: SHA-256 of the training samples, by which a checkpoint identifies them."""

    train: TokenizedSamples
    digest: str
    valid: TokenizedSamples | None
    test: TokenizedSamples | None


def load_all(config: LoraConfig, tokenizer: Any) -> Data:
    """Load from the folder `data`, or from the hub. Raises RefusedError."""
    values = config.values
    folder = config.resolve(values.data)
    if getattr(values, "hf_dataset", None) or not folder.is_dir():
        return _from_hub(config, folder, tokenizer)
    names = ("train", "valid", *(("test",) if values.test else ()))
    found = {name: load(folder, name, tokenizer, config) for name in names}
    train, valid, test = (found.get(name) for name in ("train", "valid", "test"))
    if train is None:
        raise config.refuse("data", f"{folder} has no train.jsonl")
    if values.test and test is None:
        raise config.refuse("test", f"{folder} has no test.jsonl")
    return Data(train[0], train[1], valid[0] if valid else None, test[0] if test else None)


def load(folder: Path, name: str, tokenizer: Any, config: LoraConfig) -> tuple[TokenizedSamples, str] | None:
    """The subset `name` (train, valid or test) and the SHA-256 of its file; None if the file is missing.

    Raises RefusedError that names file and line.
    """
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return None
    lines, digest = _parse(path)
    check = _Check(path, config)
    for number, line in enumerate(lines, 1):
        check.line(number, line)
    try:
        dataset = create_dataset(lines, tokenizer, config.values)
    except ValueError as error:
        raise RefusedError(f"{path}: {error}") from error
    samples = TokenizedSamples(path, dataset, config.values.max_seq_length)
    _ = samples[0]  # a tokenizer without a chat template fails now, not at a later step
    return samples, digest


def _from_hub(config: LoraConfig, folder: Path, tokenizer: Any) -> Data:
    values = config.values
    custom = getattr(values, "hf_dataset", None)
    key, name = ("hf_dataset", "hf_dataset") if custom else ("data", values.data)
    if not custom and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise config.refuse("data", f"no such folder: {folder}")
    try:
        subsets = load_custom_hf_dataset(values, tokenizer) if custom else load_hf_dataset(name, tokenizer, values)
    except ImportError as error:
        text = "" if custom else f"no such folder: {folder}; "
        raise config.refuse(key, f"{text}hub datasets need the package datasets (pip install datasets)") from error
    except (ValueError, TypeError, KeyError) as error:
        raise config.refuse(key, f"{type(error).__name__}: {error}") from error
    train, valid, test = (
        TokenizedSamples(f"{name} ({kind})", subset, values.max_seq_length) if len(subset) else None
        for kind, subset in zip(("train", "valid", "test"), subsets, strict=True)
    )
    if train is None:
        raise config.refuse(key, f"{name} has no training samples")
    if values.test and test is None:
        raise config.refuse("test", f"{name} has no test samples")
    _ = train[0]
    return Data(train, _digest(subsets[0]), valid, test if values.test else None)


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


def _parse(path: Path) -> tuple[list[dict[str, Any]], str]:
    lines, digest = [], hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                lines.append(_parse_line(path, number, raw))
    except OSError as error:
        raise RefusedError(f"data: cannot read {path}: {error}") from None
    if not lines:
        raise RefusedError(f"{path}: the file is empty; at least 1 line is needed")
    return lines, digest.hexdigest()


def _parse_line(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise RefusedError(f"{path}:{number}: expected a JSON object, found an empty line")
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise RefusedError(f"{path}:{number}: invalid JSON: {error}") from None
    if not isinstance(line, dict):
        raise RefusedError(f"{path}:{number}: expected a JSON object, found {type(line).__name__}")
    return line


class _Check:
    """Checks that every line has the format of the first: mlx_lm reads only the first to choose the format."""

    def __init__(self, path: Path, config: LoraConfig) -> None:
        self._path = path
        self._mask_prompt = config.values.mask_prompt
        names = {
            key: getattr(config.values, f"{key}_feature", "messages" if key == "chat" else key)
            for key in ("prompt", "completion", "chat", "text")
        }
        self._pair = (names["prompt"], names["completion"])
        self._chat, self._text = names["chat"], names["text"]
        self._kind = ""

    def line(self, number: int, line: dict[str, Any]) -> None:
        """Raises RefusedError."""
        where = f"{self._path}:{number}"
        self._kind = self._kind or self._kind_of(where, line)
        if self._kind == "chat":
            self._messages(where, line)
            return
        for key in self._pair if self._kind == "completions" else (self._text,):
            if not isinstance(line.get(key), str):
                raise RefusedError(f"{where}: expected text under {key!r}, found {_found(line, key)}")
            if not line[key].strip():
                raise RefusedError(f"{where}: expected text under {key!r}, found only white space")

    def _kind_of(self, where: str, line: dict[str, Any]) -> str:
        if all(key in line for key in self._pair):
            return "completions"
        if self._chat in line:
            return "chat"
        if self._text in line:
            if self._mask_prompt:
                raise RefusedError(
                    f"{where}: mask_prompt needs prompts or messages, found plain text under {self._text!r}"
                )
            return "text"
        raise RefusedError(
            f"{where}: no known key; allowed are {self._text!r}, {self._chat!r}, or {self._pair[0]!r} and "
            f"{self._pair[1]!r}; found {', '.join(sorted(line)) or 'none'!s:.200}"
        )

    def _messages(self, where: str, line: dict[str, Any]) -> None:
        messages = line.get(self._chat)
        if not isinstance(messages, list) or not messages:
            found = _found(line, self._chat)
            raise RefusedError(f"{where}: expected a list of messages under {self._chat!r}, found {found}")
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            raise RefusedError(f"{where}: every message under {self._chat!r} must be an object with a role")


def _found(line: dict[str, Any], key: str) -> str:
    return f"{line[key]!r:.80}" if key in line else "keys " + f"{', '.join(sorted(line)) or 'none'}"[:200]
