"""Unevaluated graphs: counted only where that is safe."""

import subprocess
import sys
import threading

import mlx.core as mx

from mlx_worker.autopsy import census, lazy_graphs
from mlx_worker.autopsy.findings import search


def chain(length):
    total, one = mx.zeros((5,)), mx.ones((5,))
    mx.eval(total, one)
    for _ in range(length):
        total = total + one
    return total


def test_a_graph_deeper_than_the_usual_stack_is_counted():
    """Runs in a subprocess: MLX's recursion could crash it."""
    code = """
import time, threading
from mlx_worker.autopsy import census, lazy_graphs
from tests.training.autopsy.test_lazy_graphs import chain
total, found = chain(150_000), lazy_graphs.Graphs()
native_bytes = census.native_bytes()
bounds = lazy_graphs.Bounds(native_bytes, native_bytes, 2**40)
lazy_graphs.count_operations(found, [total], bounds, time.monotonic() + 600)
print(found.operations, found.by_kind[lazy_graphs.kind_of(total)], threading.stack_size())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["150000", "150000", "0"], (done.returncode, done.stderr)


def test_a_graph_is_found_among_the_arrays_of_a_whole_model():
    """MLX takes only so many arrays by name at once; two of these have most of their graph in common."""
    total = chain(50)
    arrays = [mx.full((3,), index) for index in range(2500)]
    mx.eval(arrays)
    arrays[1200:1200], arrays[10:10] = [total], [-total]
    found = lazy_graphs.Graphs()
    lazy_graphs.count_operations(found, arrays, lazy_graphs.Bounds(2**27, 0, 2**40), float("inf"))
    assert (found.operations, found.reason) == (51, "")
    assert found.by_kind == {lazy_graphs.kind_of(total): 51}
    assert found.ends == {id(total), id(arrays[10])}


def test_an_error_becomes_the_reason(monkeypatch, capfd):
    def refuse(*arrays, **names):
        raise TypeError("another MLX")

    monkeypatch.setattr(mx, "export_to_dot", refuse)
    found = lazy_graphs.Graphs()
    lazy_graphs.count_operations(found, [chain(2)], lazy_graphs.Bounds(2**27, 0, 2**40), float("inf"))
    assert (found.operations, found.reason) == (None, "TypeError: another MLX")
    monkeypatch.setattr(threading.Thread, "start", lambda thread: [][0])
    lazy_graphs.count_operations(found, [chain(2)], lazy_graphs.Bounds(2**27, 0, 2**40), float("inf"))
    assert (found.operations, found.reason) == (None, "IndexError: list index out of range")
    assert capfd.readouterr().err == "", "the end of the log is read for the cause of a death"


def test_a_graph_is_not_walked_where_that_is_not_safe():
    """Without room for the text, time, or a deep enough stack nothing is counted, and the reason is reported."""
    total = chain(4)
    near = lazy_graphs.Bounds(native_bytes=2**30, grown_bytes=2**30, room_bytes=2**20)
    found = lazy_graphs.Graphs()
    lazy_graphs.count_operations(found, [total], near, float("inf"))
    assert "not enough memory below the limit" in found.reason
    lazy_graphs.count_operations(found, [total], lazy_graphs.Bounds(2**30, 2**30, 2**40), 0.0)
    assert "time" in found.reason
    lazy_graphs.count_operations(found, [total], lazy_graphs.Bounds(2**40, 0, 2**40), float("inf"))
    assert "too deep" in found.reason
    assert found.operations is None


def test_a_graph_counted_only_once_is_reported_if_large():
    """The first count did not fit in the time; only the last one is complete."""
    total, many = chain(6000), [mx.full((2, 91), index) for index in range(9)]
    censuses = [census.Census(step=1), census.Census(step=7)]
    objects = census.take(censuses[1], 7, float("inf"), lazy_graphs.Bounds(2**27, 0, 2**40))
    findings, _ = search(censuses, objects, float("inf"))
    (finding,) = [finding for finding in findings if finding.kind != "note"]  # the first census counted nothing
    assert finding.what.startswith("float32 [5], not evaluated")
    assert objects == []
    del total, many
