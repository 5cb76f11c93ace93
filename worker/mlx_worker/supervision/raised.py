"""An exception as the worker reports it: bounded in size, and safe to build whatever was raised."""

import traceback
from pathlib import Path

from mlx_supervisor import wire

ERRORS_LIMIT = 8
MESSAGE_LIMIT_BYTES = 2048
FILE_LIMIT_BYTES = 1024
NAME_LIMIT_BYTES = 256
"""Eight errors of these sizes take 28 KiB of the 64 KiB frame; the reason takes at most 16 KiB."""
_FOLDERS = (Path(traceback.__file__).parent, Path(wire.__file__).parents[1], Path(__file__).parents[1])
_LIBRARIES = ("<frozen ", *(f"{folder}/" for folder in _FOLDERS))
"""How the files of the standard library, the supervisor and the worker begin."""


def errors_of(error: BaseException) -> list[wire.Raised]:
    """The error, the members if it is a group, then its `__cause__`, else its `__context__`, and so on; at most 8."""
    errors: list[wire.Raised] = []
    seen: set[int] = set()
    waiting = [error]
    while waiting and len(errors) < ERRORS_LIMIT:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        errors.append(_raised(each))
        members = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        context = None if each.__suppress_context__ else each.__context__
        earlier = context if each.__cause__ is None else each.__cause__
        waiting += [*([] if earlier is None else [earlier]), *reversed(members)]
    return errors


def _raised(error: BaseException) -> wire.Raised:
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    file, line, function = _place(error)
    return wire.Raised(
        kind=_cut(module + kind.__qualname__, NAME_LIMIT_BYTES),
        message=_cut(_message(error), MESSAGE_LIMIT_BYTES),
        file=_cut(file[-FILE_LIMIT_BYTES:], FILE_LIMIT_BYTES),
        line=line,
        function=_cut(function, NAME_LIMIT_BYTES),
    )


def _message(error: BaseException) -> str:
    try:
        return str(error.msg if isinstance(error, SyntaxError) else error)
    except BaseException:  # the user's `__str__` may raise anything
        return "<exception str() failed>"


def _place(error: BaseException) -> tuple[str, int, str]:
    """File, line and function of the innermost frame of the user's code, else of the innermost frame."""
    if isinstance(error, SyntaxError) and isinstance(error.filename, str) and isinstance(error.lineno, int):
        return error.filename, max(error.lineno, 0), ""
    frames = [
        (frame.f_code.co_filename, line or 0, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [frame for frame in frames if not _is_library(frame[0])]
    return (own or frames or [("", 0, "")])[-1]


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or "/site-packages/" in file or "/dist-packages/" in file


def _cut(text: str, limit_bytes: int) -> str:
    """The text's beginning in UTF-8, with lone surrogates escaped."""
    return text[:limit_bytes].encode("utf-8", "backslashreplace")[:limit_bytes].decode(errors="ignore")
