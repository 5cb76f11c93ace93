"""Data files, `train.jsonl` and the like, read and checked line by line.

Imports no MLX, so that a wrong line is refused at once. mlx_lm chooses the format by the first line alone; here every
line must have it.
"""

import difflib
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.config import LoraConfig
from mlx_worker.tasks.safetensors_file import POINTER
from mlx_worker.words import listed

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class Lines:
    """The content of a file. `digest`: its SHA-256; `empty`: numbers of the lines whose messages have no content."""

    path: Path
    rows: list[dict[str, Any]]
    digest: str
    empty: list[int]


def read_subsets(config: LoraConfig) -> dict[str, Lines] | None:
    """The data folder's files by subset (train, valid, test); None if the data come from the hub.

    Raises RefusedError that names the key, or file and line.
    """
    values = config.values
    if getattr(values, "hf_dataset", None):
        _need_datasets(config, "hf_dataset")
        return None
    if not config.given.get("data"):
        raise config.refuse(
            "data",
            f"not set; mlx_lm would download its example data set, {values.data}. Set it to a folder with train.jsonl "
            "(data: my_data) or to a data set on the hub",
        )
    folder = config.resolve(values.data)
    if not folder.is_dir():
        _refuse_wrong_folder(config, folder)
        _need_datasets(config, "data", f"no such folder: {folder}; ")
        return None
    found = {}
    for name in ("train", "valid", *(("test",) if values.test else ())):
        lines = read_lines(folder / f"{name}.jsonl", config)
        if lines is not None:
            found[name] = lines
    if "train" not in found:
        raise config.refuse("data", f"{folder} has no train.jsonl; {_content_of(folder)}")
    if values.test and "test" not in found:
        raise config.refuse("test", f"{folder} has no test.jsonl; add it, or set test: false")
    return found


def read_lines(path: Path, config: LoraConfig) -> Lines | None:
    """The lines of a file; None if there is none. Raises RefusedError that names file and line."""
    if path.is_symlink() and not path.exists():
        raise config.refuse("data", f"{path} is a link to {path.readlink()}, which does not exist")
    if not path.exists():
        return None
    if not path.is_file():
        raise config.refuse("data", f"expected the file {path}, found a folder")
    rows, digest = _parse(path)
    check = Format(path, config)
    for number, row in enumerate(rows, 1):
        check.line(number, row)
    check.refuse_blank(len(rows))
    return Lines(path, rows, digest, check.empty)


def _refuse_wrong_folder(config: LoraConfig, folder: Path) -> None:
    name = config.values.data
    if folder.exists():
        raise config.refuse("data", f"expected a folder with train.jsonl, found the file {folder}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise config.refuse("data", f"no such folder: {folder}")


def _need_datasets(config: LoraConfig, key: str, reason: str = "") -> None:
    if sys.modules.get("datasets") is None and importlib.util.find_spec("datasets") is None:
        raise config.refuse(key, f"{reason}hub datasets need the package datasets (pip install datasets)")


def _content_of(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return "the folder is empty"
    return f"it has {listed(names, _NAMES_SHOWN)}. Each line of train.jsonl is one JSON object"


def _parse(path: Path) -> tuple[list[dict[str, Any]], str]:
    rows, digest = [], hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                rows.append(_parse_line(path, number, raw))
    except OSError as error:
        raise RefusedError(f"data: cannot read {path}: {error}") from None
    if not rows:
        raise RefusedError(f"{path}: the file is empty; at least 1 line is needed")
    return rows, digest.hexdigest()


def _parse_line(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    where = f"{path}:{number}"
    if not raw.strip():
        raise RefusedError(f"{where}: expected a JSON object, found an empty line")
    if number == 1 and raw.startswith(POINTER):
        raise RefusedError(f"{where}: this is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
    if number == 1 and raw.strip() in (b"[", b"{"):
        raise RefusedError(
            f"{where}: invalid JSON: this looks like one JSON document over several lines; "
            "write one object per line (jq -c '.[]')"
        )
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(line, dict):
        raise RefusedError(f"{where}: expected a JSON object, found {type(line).__name__}")
    return line


class Format:
    """Checks that every row has the format of the first. `where`: the file, or the data set's name.

    `features`: the mapping with `text_feature` and so on, by default the configuration.
    """

    def __init__(self, where: Path | str, config: LoraConfig, features: Mapping[str, Any] | None = None) -> None:
        self.empty: list[int] = []
        self._where = where
        self._mask_prompt = config.values.mask_prompt
        features = vars(config.values) if features is None else features
        names = {
            key: features.get(f"{key}_feature") or ("messages" if key == "chat" else key)
            for key in ("prompt", "completion", "chat", "text")
        }
        self._pair = (names["prompt"], names["completion"])
        self._chat, self._text = names["chat"], names["text"]
        self._kind = ""
        self._blank: list[tuple[int, str]] = []

    def line(self, number: int, line: dict[str, Any]) -> None:
        """Raises RefusedError."""
        where = f"{self._where}:{number}"
        self._kind = self._kind or self._kind_of(where, line)
        if self._kind == "chat":
            self._messages(where, number, line)
            return
        for key in self._pair if self._kind == "completions" else (self._text,):
            if not isinstance(line.get(key), str):
                raise RefusedError(f"{where}: expected text under {key!r}, found {_found(line, key)}")
            if not line[key].strip():
                self._blank.append((number, key))

    def refuse_blank(self, lines: int) -> None:
        """Raises RefusedError if a line has no text, or all conversations have no content."""
        if self._blank:
            number, key = self._blank[0]
            count = len({number for number, _ in self._blank})
            also = f" ({count} of {lines} lines are like this; remove them)" if count > 1 else "; remove the line"
            raise RefusedError(f"{self._where}:{number}: expected text under {key!r}, found only white space{also}")
        if lines and len(self.empty) == lines:
            raise RefusedError(f"{self._where}: no message has any content; there is nothing to learn")

    def _kind_of(self, where: str, line: dict[str, Any]) -> str:
        if all(key in line for key in self._pair):
            return "completions"
        if self._chat in line:
            return "chat"
        if self._text in line:
            if self._mask_prompt:
                raise RefusedError(
                    f"{where}: mask_prompt needs prompts or messages, found plain text under {self._text!r}; "
                    "set mask_prompt: false"
                )
            return "text"
        near = [
            f"{key!r} instead of {found[0]!r}"
            for key in (self._text, self._chat, *self._pair)
            if key not in line and (found := difflib.get_close_matches(key, list(line), n=1, cutoff=0.7))
        ]
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise RefusedError(
            f"{where}: no known key; allowed are {self._text!r}, {self._chat!r}, or {self._pair[0]!r} and "
            f"{self._pair[1]!r}; found {', '.join(sorted(line)) or 'none'!s:.200}{hint} text_feature, chat_feature, "
            "prompt_feature and completion_feature in the YAML file set other names"
        )

    def _messages(self, where: str, number: int, line: dict[str, Any]) -> None:
        messages = line.get(self._chat)
        if not isinstance(messages, list) or not messages:
            found = _found(line, self._chat)
            raise RefusedError(f"{where}: expected a list of messages under {self._chat!r}, found {found}")
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            raise RefusedError(f"{where}: every message under {self._chat!r} must be an object with a role")
        if self._mask_prompt and len(messages) < 2:
            raise RefusedError(
                f"{where}: mask_prompt needs a message before the answer under {self._chat!r}, found "
                f"{len(messages)} message; remove the line, or set mask_prompt: false"
            )
        for message in messages:
            content = message.get("content")
            if not isinstance(content, str | list | None):
                raise RefusedError(
                    f"{where}: expected text as content of the {message['role']} message, found {content!r:.80}"
                )
        if not any(_has_content(message) for message in messages):
            self.empty.append(number)


def _has_content(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _found(line: dict[str, Any], key: str) -> str:
    return f"{line[key]!r:.80}" if key in line else "keys " + f"{', '.join(sorted(line)) or 'none'}"[:200]
