"""Reading objects of any kind without running their own code.

An ordinary attribute lookup may run a property, a proxy's `__getattr__` or a false `__class__`. So only descriptors of
built-in types are used, and comparisons use `is`.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, GetSetDescriptorType, MappingProxyType, MemberDescriptorType, ModuleType
from typing import Any, cast

SOURCE_LIMIT_BYTES = 512 * 1024
"""A longer file is not searched for the line of a class or a global."""
_DICT_OF_CLASS = cast(Any, type.__dict__["__dict__"])
_DICT_OF_MODULE = cast(Any, ModuleType).__dict__["__dict__"]
_MRO = cast(Any, type.__dict__["__mro__"])
_QUALNAME = cast(Any, type.__dict__["__qualname__"])


def mro(kind: type) -> tuple[type, ...]:
    """The class and its ancestors, without running its metaclass's code."""
    ancestors: tuple[type, ...] | None = _MRO.__get__(kind)
    return ancestors or (kind,)


def class_dict(kind: type) -> "MappingProxyType[str, Any]":
    """The class's own attributes, without inherited ones."""
    found: MappingProxyType[str, Any] = _DICT_OF_CLASS.__get__(kind)
    return found


def module_dict(module: ModuleType) -> dict[str, Any]:
    """A module's globals, without running a `__getattribute__` of its class."""
    found: dict[str, Any] = _DICT_OF_MODULE.__get__(module)
    return found


def is_class(one: Any) -> bool:
    """Whether it is a class."""
    return any(ancestor is type for ancestor in mro(type(one)))


def type_name(kind: type) -> str:
    """Module and qualified name; for built-in types the name alone."""
    name, module = _QUALNAME.__get__(kind), _module_name(kind)
    return name if module in ("builtins", "") else f"{module}.{name}"


def _module_name(kind: type) -> str:
    module = class_dict(kind).get("__module__")
    if type(module) is str:
        return module
    # A class made in C has the module in front of its name.
    return str(cast(Any, type.__dict__["__name__"]).__get__(kind)).rpartition(".")[0]


def instance_dict(one: Any) -> dict[str, Any] | None:
    """An object's `__dict__`, read by the interpreter's own descriptor; None without one."""
    for ancestor in mro(type(one)):
        descriptor = class_dict(ancestor).get("__dict__")
        if type(descriptor) is GetSetDescriptorType:
            found = descriptor.__get__(one)
            return found if type(found) is dict else None
        if descriptor is not None:
            return None
    return None


def slots(one: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of an object's `__slots__`."""
    for ancestor in mro(type(one)):
        for name, descriptor in class_dict(ancestor).items():
            if type(name) is str and type(descriptor) is MemberDescriptorType and not name.startswith("__"):
                try:
                    yield name, descriptor.__get__(one)
                except AttributeError:  # not set
                    continue


def module_of_globals(names: dict[Any, Any]) -> str | None:
    """The name of the module whose globals this dictionary is."""
    name = names.get("__name__") if "__name__" in names else None
    if type(name) is not str:
        return None
    module = sys.modules.get(name)
    if type(module) is ModuleType and module_dict(module) is names:
        return name
    return name if "__builtins__" in names else None


def place(code: CodeType) -> str:
    """ "file:line" of a function."""
    return f"{short(code.co_filename)}:{code.co_firstlineno}"


def place_of_class(kind: type) -> str:
    """ "file:line" of a class statement, "" if unknown."""
    defined = class_dict(kind)
    module, line = defined.get("__module__"), defined.get("__firstlineno__")  # the latter from Python 3.13 on
    path = _file_of(module)
    if not path:
        return ""
    if type(line) is not int:
        name = str(_QUALNAME.__get__(kind)).rpartition(".")[2]
        line = _lines(path).get(f"class {name}")
    if line is None:
        codes = [value.__code__ for value in defined.values() if type(value) is FunctionType]
        line = min((code.co_firstlineno for code in codes if code.co_filename == path), default=None)
    return short(path) if line is None else f"{short(path)}:{line}"


def place_of_global(module: str, name: str) -> str:
    """ "file:line" of the first assignment to a module's global, "" if unknown."""
    path = _file_of(module)
    if not path:
        return ""
    line = _lines(path).get(name)
    return short(path) if line is None else f"{short(path)}:{line}"


def short(path: str) -> str:
    """The path relative to the folder on `sys.path` that contains it."""
    folders = [folder for folder in sys.path if type(folder) is str and folder and path.startswith(folder + "/")]
    return path[len(max(folders, key=len)) + 1 :] if folders else path


def _file_of(module: Any) -> str:
    found = sys.modules.get(module) if type(module) is str else None
    path = module_dict(found).get("__file__") if type(found) is ModuleType else None
    return path if type(path) is str else ""


@functools.lru_cache(maxsize=16)
def _lines(path: str) -> dict[str, int]:
    """The first line of each "class NAME", and of the first assignment to each name."""
    lines: dict[str, int] = {}
    try:
        with Path(path).open("rb") as file:
            source = file.read(SOURCE_LIMIT_BYTES + 1)
        nodes = ast.walk(ast.parse(source)) if len(source) <= SOURCE_LIMIT_BYTES else ()
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                lines[f"class {node.name}"] = min(node.lineno, lines.get(f"class {node.name}", node.lineno))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return {}
    return lines


def forget() -> None:
    """Drop the cached lines of source files."""
    _lines.cache_clear()
