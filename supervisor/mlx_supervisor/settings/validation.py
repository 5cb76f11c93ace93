"""From a TOML table to a msgspec struct, with every problem named by its key's full path.

msgspec stops at the first problem and shows keys of mappings as `[...]`. So each field is converted separately: msgspec
checks the value, this module names the key, what was found and what is allowed.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import date, time
from typing import Annotated, Any, TypeGuard, TypeVar, get_args, get_origin

import msgspec
from msgspec import inspect

PROBLEMS_SHOWN = 50
FOUND_LENGTH = 80
NESTING_LIMIT = 32

S = TypeVar("S", bound=msgspec.Struct)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Problems:
    """The problems of a file, in the order found; at most `PROBLEMS_SHOWN` are kept, all are counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, path: str, found: str, allowed: str, hint: str = "") -> None:
        """One problem: the key's full path, what was found, what is allowed, and a hint."""
        self.count += 1
        if len(self.shown) < PROBLEMS_SHOWN:
            self.shown.append(f"{path}: found {found}; allowed: {allowed}{f' ({hint})' if hint else ''}")

    def listed(self) -> list[str]:
        """The problems, with the number of those left out at the end."""
        hidden = self.count - len(self.shown)
        return [*self.shown, *([f"and {hidden} more"] if hidden else [])]


def join(path: str, key: str) -> str:
    """A key's full path as TOML writes it."""
    shown = key if len(key) <= FOUND_LENGTH else f"{key[:FOUND_LENGTH]}…"
    step = shown if _BARE_KEY.fullmatch(key) else json.dumps(shown, ensure_ascii=False)
    return f"{path}.{step}" if path else step


def show(value: object) -> str:
    """A value as found, with its type in TOML's words, shortened."""
    match value:
        case Mapping():
            return "a table"
        case list():
            return "an array"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"{'the whole number' if isinstance(value, int) else 'the number'} {_number(value)}"
        case str():
            text = json.dumps(value, ensure_ascii=False)
            return text if len(text) <= FOUND_LENGTH else f"{text[:FOUND_LENGTH]}…"
        case date() | time():
            return f"the date or time {value}"
        case _:
            return type(value).__name__


def _number(value: int | float) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"of {value.bit_length()} bits"
    return repr(value)


def convert(table: object, kind: type[S], path: str, problems: Problems) -> S | None:
    """`table` as a `kind`; None after adding every problem found to `problems`."""
    if not is_table(table):
        problems.add(path, show(table), "a table")
        return None
    before = problems.count
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key in table:
        if key not in fields:
            add_unknown(path, key, kind, problems)
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert_field(table[name], field.type, join(path, name), problems)
        elif field.required:
            problems.add(join(path, name), "nothing", allowed(inspect.type_info(field.type)))
    return kind(**values) if problems.count == before else None


def is_table(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether this is a TOML table; its keys are always strings."""
    return isinstance(value, Mapping)


def _convert_field(value: object, kind: Any, path: str, problems: Problems) -> object:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return convert(value, kind, path, problems)
    parse = _parser(kind)
    if parse is None and isinstance(value, float) and not math.isfinite(value):
        problems.add(path, show(value), allowed(inspect.type_info(kind)), "a finite number")
        return None
    try:
        return msgspec.convert(value, kind, strict=True) if parse is None else parse(value)
    except msgspec.ValidationError:
        where, what = _deepest(value, kind, path)
        problems.add(where, show(what), allowed(inspect.type_info(kind)))
    except ValueError as error:
        problems.add(path, show(value), str(error))
    return None


def _parser(kind: Any) -> Callable[[object], object] | None:
    """The function that a type names as `extra={"parse": …}`, here or in a union with None."""
    for each in (kind, *get_args(kind)):
        info = inspect.type_info(each) if get_origin(each) is Annotated else None
        if isinstance(info, inspect.Metadata) and info.extra and "parse" in info.extra:
            parse: Callable[[object], object] = info.extra["parse"]
            return parse
    return None


def _deepest(value: object, kind: Any, path: str) -> tuple[str, object]:
    """The first wrong element of an array, or the value itself."""
    info = inspect.type_info(kind)
    if isinstance(value, list) and isinstance(info, inspect.ListType):
        for index, element in enumerate(value):
            try:
                msgspec.convert([element], kind, strict=True)
            except msgspec.ValidationError:
                return f"{path}[{index}]", element
    return path, value


def add_unknown(path: str, key: str, kind: type[msgspec.Struct], problems: Problems) -> None:
    """An unknown key, with the nearest known key, here or deeper."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    deeper = {dotted.replace(".", "_"): dotted for dotted in leaves(kind) if "." in dotted}
    deeper.update({dotted.rpartition(".")[2]: dotted for dotted in deeper.values()})
    near = difflib.get_close_matches(key[:FOUND_LENGTH], [*names, *deeper], n=1, cutoff=0.7)
    hint = f"did you mean {join_dotted(path, deeper.get(near[0], near[0]))}?" if near else ""
    problems.add(join(path, key), "an unknown key", ", ".join(names), hint)


def join_dotted(path: str, dotted: str) -> str:
    """`path` and a path below it."""
    return f"{path}.{dotted}" if path else dotted


def leaves(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """The dotted path of every key of a struct and of the structs in it."""
    found: list[str] = []
    for field in msgspec.structs.fields(kind):
        path = join_dotted(prefix, field.encode_name)
        inner = field.type
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            found += leaves(inner, path)
        else:
            found.append(path)
    return found


def allowed(info: inspect.Type) -> str:
    """A type in words."""
    match info:
        case inspect.UnionType(types=types):
            return " or ".join(allowed(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.IntType(ge=low, le=high):
            return f"a whole number{_range(None, low, high)}"
        case inspect.FloatType(gt=above, ge=low, le=high):
            return f"a number{_range(above, low, high)}"
        case inspect.LiteralType(values=values):
            return " or ".join(show(value) for value in values)
        case inspect.ListType(item_type=item):
            return f"an array, each element {allowed(item)}"
        case _:
            plain = {inspect.BoolType: "true or false", inspect.StrType: "a string"}
            return plain.get(type(info), "a table")


def _range(above: float | None, low: float | None, high: float | None) -> str:
    parts = [f"above {above:g}" if above is not None else "", f"from {low:g}" if low is not None else ""]
    parts.append(f"to {high:.10g}" if high is not None else "")
    words = " ".join(part for part in parts if part)
    return f" {words}" if words else ""


def check_plain(value: object, path: str, problems: Problems, depth: int = 0) -> None:
    """Check that free-form data survives JSON: no dates, no NaN, whole numbers of 64 bits, bounded nesting."""
    if depth > NESTING_LIMIT:
        problems.add(path, "deeper nesting", f"at most {NESTING_LIMIT} levels")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_plain(inner, join(path, key), problems, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_plain(inner, f"{path}[{index}]", problems, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        problems.add(path, show(value), "a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        problems.add(path, show(value), "a whole number of at most 64 bits")
    elif isinstance(value, date | time):
        problems.add(path, show(value), "a string, number, boolean, array or table", "write it as a string")
