"""What a worker reports of an exception: bounded, whatever was raised."""

import asyncio
import importlib
import json
import linecache
import multiprocessing

import pytest

from mlx_supervisor import wire
from mlx_worker.supervision.raised import ERRORS_LIMIT, errors_of


def caught(function, *args):
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def fail(error):
    raise error


def fail_while_handling(first, second):
    try:
        fail(first)
    except ValueError:
        raise second  # noqa: B904


def fail_from(first, second, cause):
    try:
        fail(first)
    except ValueError:
        raise second from cause


def messages(error):
    return [each.message for each in errors_of(error)]


def encoded(errors, reason=""):
    """The frame, as the supervisor reads it."""
    frame = wire.encode(wire.Bye(run="a", generation=1, seq=1, outcome="failed", reason=reason, step=1, errors=errors))
    bye = wire.decode_worker(frame)
    assert isinstance(bye, wire.Bye)
    assert bye.errors == errors
    return frame


def test_kind_message_and_place():
    error = caught(fail, KeyError("label"))
    found = errors_of(error)
    place = (__file__, fail.__code__.co_firstlineno + 1, "fail")
    assert found == [wire.Raised(kind="KeyError", message="'label'", file=place[0], line=place[1], function=place[2])]
    assert errors_of(json.JSONDecodeError("bad", "", 0))[0].kind == "json.decoder.JSONDecodeError"
    assert errors_of(ValueError()) == [wire.Raised(kind="ValueError")]


@pytest.mark.parametrize(
    "library",
    [
        "/home/user/venv/lib/python3.12/site-packages/numpy/core.py",
        "<frozen importlib>",
        linecache.__file__,
        wire.__file__,
    ],
)
def test_the_place_is_in_the_users_code(library, tmp_path):
    code = compile("def take(function):\n    function()\n\n\ndef broken():\n    1 / 0\n", library, "exec")
    names = {}
    exec(code, names)
    found = errors_of(caught(lambda: names["take"](names["broken"])))[0]
    assert (found.file, found.function) == (__file__, "<lambda>")
    inside = errors_of(caught(lambda: names["take"](lambda: fail(KeyError()))))[0]
    assert inside.function == "fail"
    alone = caught(names["broken"])
    alone = errors_of(alone.with_traceback(alone.__traceback__.tb_next))[0]
    assert (alone.file, alone.line, alone.function) == (library, 6, "broken"), "where no frame is the user's"


def test_a_syntax_error_is_where_the_code_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "broken_model.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = errors_of(caught(importlib.import_module, "broken_model"))[0]
    assert (found.kind, found.message) == ("SyntaxError", "invalid syntax")
    assert (found.file, found.line, found.function) == (str(tmp_path / "broken_model.py"), 2, "")
    odd = SyntaxError("odd", ("file", "no number", None, None))
    assert errors_of(odd) == [wire.Raised(kind="SyntaxError", message="odd")]


def test_the_chain_is_the_one_that_python_prints():
    assert messages(caught(fail_while_handling, ValueError("first"), ValueError("second"))) == ["second", "first"]
    cause = ValueError("cause")
    assert messages(caught(fail_from, ValueError("a"), ValueError("b"), cause)) == ["b", "cause"]
    assert messages(caught(fail_from, ValueError("a"), ValueError("b"), None)) == ["b"]


def test_a_group_is_followed_by_its_members_then_by_its_cause():
    inner = ExceptionGroup("inner", [KeyError(1), KeyError(2)])
    outer = ExceptionGroup("outer", [inner, KeyError(3)])
    outer.__cause__ = ValueError("cause")
    expected = ["outer (2 sub-exceptions)", "inner (2 sub-exceptions)", "1", "2", "3", "cause"]
    assert messages(outer) == expected
    assert len(encoded(errors_of(ExceptionGroup("many", [KeyError(each) for each in range(100)])))) < 2000

    async def both():
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(fail, MemoryError()))

    assert [each.kind for each in errors_of(caught(asyncio.run, both()))][:2] == ["ExceptionGroup", "MemoryError"]


def test_an_error_from_a_child_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = errors_of(caught(pool.apply, int, ("x",)))
    assert [each.kind for each in found] == ["ValueError", "multiprocessing.pool.RemoteTraceback"]


def test_a_cyclic_chain_ends():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert messages(first) == ["first", "second"]


def test_the_longest_chain_of_the_longest_texts_fits_in_a_frame():
    """In characters of four bytes each, beside the longest reason."""
    wide = "\U0001f600" * 10_000_000
    kind = type("\U0001f600" * 1000, (Exception,), {"__module__": "m" * 1000})
    names = {}
    exec(compile(f"def {'f' * 9999}(error):\n    raise error", "\U00010000" * 5000, "exec"), names)
    before = None
    for _ in range(ERRORS_LIMIT * 2):
        error = kind(wide)
        error.__cause__ = before
        before = error
        caught(names["f" * 9999], error)
    errors = errors_of(error)
    assert len(errors) == ERRORS_LIMIT
    assert len(encoded(errors, reason="\U0001f600" * 4096)) > 32 * 1024, "the test's own measure"
    assert errors[0].message == "\U0001f600" * 512


class UnprintableError(Exception):
    def __init__(self, raised):
        self.raised = raised

    def __str__(self):
        raise self.raised


@pytest.mark.parametrize("raised", [ValueError(), SystemExit(), KeyboardInterrupt(), MemoryError(), RecursionError()])
def test_an_error_that_cannot_be_printed(raised):
    found = errors_of(caught(fail, UnprintableError(raised)))
    assert found[0].message == "<exception str() failed>"
    assert found[0].kind.endswith(".UnprintableError")
    encoded(found)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), GeneratorExit("end")])
def test_what_is_no_ordinary_exception(error):
    found = errors_of(caught(fail, error))
    assert (found[0].kind, found[0].message, found[0].function) == (type(error).__name__, str(error), "fail")
    encoded(found)


def test_texts_that_are_no_text():
    found = errors_of(ValueError("\udcff\x00\x1b[31m\ud800 end"))
    assert found[0].message == "\\udcff\x00\x1b[31m\\ud800 end"
    encoded(found)


def test_too_deep_a_recursion():
    def deeper():
        return deeper()

    found = errors_of(caught(deeper))
    assert (found[0].kind, found[0].function) == ("RecursionError", "deeper")


def test_the_bye_of_a_worker_has_the_chain(supervisor):
    worker = supervisor.run(supervisor.job(entry="odd_tasks:failing", steps=3))
    assert worker.process.returncode == wire.EXIT_FAILED
    kinds = [each.kind for each in worker.bye.errors]
    assert kinds == ["odd_tasks.OddError", "KeyError"]
    assert worker.bye.reason == "OddError: \\udcff no batch"
    assert {each.function for each in worker.bye.errors} == {"collate"}
    assert worker.bye.errors[0].file.endswith("odd_tasks.py")
    assert "Traceback" in worker.stderr
