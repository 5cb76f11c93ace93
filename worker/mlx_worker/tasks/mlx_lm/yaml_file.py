"""mlx_lm's configuration file as a dictionary. Stricter than mlx_lm: a key given twice is refused."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mlx_worker.errors import RefusedError

EXAMPLE = "model: path/to/model"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the package has no types
    """Reads numbers as `mlx_lm.lora` does, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in lines:
                    text = f"{key.value!r} is already given in line {lines[key.value]}; remove one of them"
                    raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
                lines[key.value] = line
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(  # mlx_lm.lora's, to the letter: without it, 1e-5 is a text
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:
     [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys and values. Raises RefusedError that names the file, and the line if there is one."""
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise RefusedError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
        raise RefusedError(_syntax(path, error)) from None
    except RecursionError:
        raise RefusedError(f"{path}: invalid YAML: nested too deeply") from None
    except OSError as error:
        raise RefusedError(f"task.config: cannot read {path}: {error.strerror}") from None
    if given is None:
        raise RefusedError(f"{path}: the file is empty; it needs at least {EXAMPLE} and data: path/to/folder")
    if not isinstance(given, dict):
        raise RefusedError(f"{path}: expected keys with values ({EXAMPLE}), found {_kind(given)}")
    for key in given:
        if not isinstance(key, str):
            raise RefusedError(f"{path}: expected names as keys, found {key!r:.80}")
    return given


def _syntax(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = str(getattr(error, "problem", None) or error)
    if "'\\t'" in problem or (mark and mark.buffer and mark.buffer[mark.pointer : mark.pointer + 1] == "\t"):
        return f"{where}: invalid YAML: this line has a tab; indent with spaces"
    if "is already given in line" in problem:
        return f"{where}: {problem}"
    if "mapping values are not allowed" in problem:
        problem += "; is the indentation right, and is a text with a colon in quotes?"
    return f"{where}: invalid YAML: {problem}"


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list; remove the leading dashes"
    if isinstance(value, str):
        missing = "; a blank must follow each colon" if re.search(r"\w:\S", value) else ""
        return f"the text {value[:60]!r}{missing}"
    return f"{value!r:.60}"
