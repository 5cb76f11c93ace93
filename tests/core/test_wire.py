"""The wire: what was said arrives as it was said, and nothing that arrives does more harm than a `WireError`."""

import math
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from mlx_supervisor import wire
from mlx_worker.checkpoint import manifest as manifest_file

WORKER, SUPERVISOR = get_args(wire.WorkerMessage), get_args(wire.SupervisorMessage)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have."""
    match kind:
        case inspect.IntType():
            return st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            return st.floats(kind.ge, kind.le)
        case inspect.StrType(pattern=None):
            return st.text(max_size=min(kind.max_length or 64, 64))
        case inspect.StrType():
            letters = "abcdef0123456789" if "{64}" in str(kind.pattern) else "abcXYZ019"
            length = 64 if "{64}" in str(kind.pattern) else kind.max_length
            return st.text(letters, min_size=kind.min_length or length or 1, max_size=length)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType() | inspect.LiteralType():
            return st.sampled_from(getattr(kind, "values", (None,)))
        case inspect.UnionType():
            return st.one_of([_values(each) for each in kind.types])
        case inspect.ListType():
            return st.lists(_values(kind.item_type), max_size=min(kind.max_length or 4, 4))
    if isinstance(kind, inspect.StructType):
        return st.builds(kind.cls, **{each.name: _values(each.type) for each in kind.fields})
    raise AssertionError(f"no strategy for {kind}")


def _messages(kinds: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    def one(kind: Any) -> st.SearchStrategy[Any]:
        known = inspect.type_info(kind)
        assert isinstance(known, inspect.StructType)
        return st.builds(kind, **{each.name: _values(each.type) for each in known.fields})

    return st.one_of([one(kind) for kind in kinds])


def _same(one: Any, other: Any) -> bool:
    """Equal, where a NaN equals a NaN."""
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _plain(message: wire.Message) -> dict[str, Any]:
    return dict(msgpack.unpackb(wire.encode(message)))


workers, supervisors = _messages(WORKER), _messages(SUPERVISOR)
A_PHASE = wire.PhaseChange(run="night", generation=3, seq=9, phase="eval", detail="batch 4")


@given(workers)
def test_what_a_worker_says_arrives(message: wire.WorkerMessage) -> None:
    assert _same(msgspec.structs.asdict(wire.decode_worker(wire.encode(message))), msgspec.structs.asdict(message))


@given(supervisors)
def test_what_the_supervisor_says_arrives(message: wire.SupervisorMessage) -> None:
    assert wire.decode_supervisor(wire.encode(message)) == message


@given(workers | supervisors)
def test_another_msgpack_reads_us(message: wire.Message) -> None:
    read = _plain(message)
    kind = read.pop("type")
    assert kind == inspect.type_info(type(message)).tag  # type: ignore[attr-defined]
    assert read["v"] == wire.VERSION
    assert _same({"type": kind} | read, msgspec.to_builtins(message))


@given(workers, st.randoms())
def test_we_read_another_msgpack_in_any_order_of_keys(message: wire.WorkerMessage, chance: Any) -> None:
    items = list(_plain(message).items())
    chance.shuffle(items)
    frame = msgpack.packb(dict(items))
    assert _same(msgspec.structs.asdict(wire.decode_worker(frame)), msgspec.structs.asdict(message))


@given(st.binary(max_size=300))
def test_noise_is_an_error_of_ours(noise: bytes) -> None:
    for decode in (wire.decode_worker, wire.decode_supervisor):
        with pytest.raises(wire.WireError):
            decode(noise)


@given(workers, st.data())
def test_a_truncated_frame_is_malformed(message: wire.WorkerMessage, data: st.DataObject) -> None:
    frame = wire.encode(message)
    with pytest.raises(wire.WireError):
        wire.decode_worker(frame[: data.draw(st.integers(0, len(frame) - 1))])


@given(workers, st.data())
def test_a_damaged_frame_is_an_error_or_a_message(message: wire.WorkerMessage, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    found = _read(bytes(frame))
    if isinstance(found, wire.WireError):
        assert found.kind in ("malformed", "type", "version")
    else:
        assert isinstance(found, WORKER)


def _read(frame: bytes) -> wire.WorkerMessage | wire.WireError:
    try:
        return wire.decode_worker(frame)
    except wire.WireError as error:
        return error


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(workers, anything, st.data())
def test_a_field_of_another_type_is_an_error_or_fits(
    message: wire.WorkerMessage, value: Any, data: st.DataObject
) -> None:
    fields = _plain(message)
    fields[data.draw(st.sampled_from(sorted(fields)))] = value
    found = _read(msgpack.packb(fields))
    if isinstance(found, wire.WireError):
        assert len(str(found)) < 1000
    else:
        assert wire.decode_worker(wire.encode(found)) is not None


@given(st.dictionaries(st.text(max_size=8) | st.integers(0, 9), anything, max_size=4) | anything)
def test_well_formed_nonsense_is_refused(value: Any) -> None:
    for decode in (wire.decode_worker, wire.decode_supervisor):
        with pytest.raises(wire.WireError):
            decode(msgpack.packb(value))


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", None, 1.5, [1], 2**63])
def test_another_version_is_said_to_be_that(version: Any) -> None:
    frame = msgpack.packb(_plain(A_PHASE) | {"v": version})
    with pytest.raises(wire.WireError, match=r"speaks 1|`\$\.v`"):
        wire.decode_worker(frame)


def test_another_version_with_fields_of_its_own_is_still_said_to_be_that() -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(msgpack.packb(_plain(A_PHASE) | {"v": 2, "type": "mood", "colour": "blue"}))
    assert caught.value.kind == "version"


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(msgpack.packb(_plain(A_PHASE) | {"colour": "blue"}))
    assert caught.value.kind == "type"


def test_a_frame_too_long_is_not_even_read() -> None:
    padded = wire.encode(A_PHASE) + b"\xc0" * wire.FRAME_LIMIT_BYTES
    for decode in (wire.decode_worker, wire.decode_supervisor):
        with pytest.raises(wire.WireError) as caught:
            decode(padded)
        assert caught.value.kind == "oversized"
    with pytest.raises(wire.WireError) as caught:
        wire.encode(wire.PhaseChange(run="a", generation=1, seq=1, phase="eval", detail="x" * wire.FRAME_LIMIT_BYTES))
    assert caught.value.kind == "oversized"


def test_deep_nesting_does_no_harm() -> None:
    for frame in (b"\x91" * 60_000, b"\x81\xa1v" * 20_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        with pytest.raises(wire.WireError):
            wire.decode_worker(frame)


@pytest.mark.parametrize(("field", "value"), [
    ("run", ""), ("run", "../x"), ("run", "a b"), ("run", "night\n"), ("run", "x" * 65), ("run", ".night"),
    ("generation", -1), ("seq", 2**63), ("phase", "lunch"), ("detail", "x" * 513), ("detail", b"\xff"),
    ("generation", 1.5), ("generation", True),
])  # fmt: skip
def test_a_value_out_of_bounds_is_named(field: str, value: Any) -> None:
    with pytest.raises(wire.WireError, match=rf"\$\.{field}") as caught:
        wire.decode_worker(msgpack.packb(_plain(A_PHASE) | {field: value}))
    assert caught.value.kind == "type"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_duration_without_sense_is_refused(seconds: float) -> None:
    """Deadlines are made from durations: one that is no number would switch the hang detection off."""
    fields = _plain(wire.Checkpoint(run="a", generation=1, seq=1, step=1, ok=True, seconds=1, stall_s=1, size_bytes=1))
    with pytest.raises(wire.WireError):
        wire.decode_worker(msgpack.packb(fields | {"seconds": seconds}))


def test_a_loss_that_is_no_number_arrives() -> None:
    """It is the news."""
    message = wire.Bye(run="a", generation=1, seq=1, outcome="failed", reason="", step=1, loss=float("nan"))
    read = wire.decode_worker(wire.encode(message))
    assert isinstance(read, wire.Bye)
    assert read.loss is not None
    assert math.isnan(read.loss)


def test_a_manifest_comes_back_and_names_only_plain_files() -> None:
    digest = "0" * 64
    manifest = manifest_file.Manifest(run="a", step=1, files=[manifest_file.FileEntry("model.safetensors", 1, digest)])
    assert manifest_file.load_manifest(wire.dump_json(manifest)) == manifest
    good = wire.dump_json(manifest)
    for bad in (b"../model.safetensors", b"/etc/passwd", b"a/b", b"a\\n", b"", b".x"):
        with pytest.raises(wire.WireError):
            manifest_file.load_manifest(good.replace(b"model.safetensors", bad))
    for bad in (b"0" * 63, b"0" * 65, b"G" * 64, b"0" * 64 + b"\\n"):
        with pytest.raises(wire.WireError):
            manifest_file.load_manifest(good.replace(digest.encode(), bad))


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_noise_is_neither_a_job_nor_a_manifest(noise: bytes) -> None:
    for load in (wire.load_job, manifest_file.load_manifest):
        with pytest.raises(wire.WireError):
            load(noise)


def test_json_too_long_is_not_even_read() -> None:
    for load, limit in (
        (wire.load_job, wire.JOB_LIMIT_BYTES),
        (manifest_file.load_manifest, manifest_file.MANIFEST_LIMIT_BYTES),
    ):
        with pytest.raises(wire.WireError) as caught:
            load(b" " * (limit + 1))
        assert caught.value.kind == "oversized"
    for frame in (b"[" * 100_000, b'{"a":' * 20_000):
        with pytest.raises(wire.WireError):
            manifest_file.load_manifest(frame)


def test_a_job_comes_back() -> None:
    job = wire.Job(run="a", generation=1, run_dir="/x", task=wire.TaskJob(kind="python", base_dir="/", args={"n": [1]}))
    assert wire.load_job(wire.dump_json(job)) == job


def test_a_frame_without_a_version_is_of_an_unknown_version() -> None:
    fields = _plain(A_PHASE)
    del fields["v"]
    with pytest.raises(wire.WireError, match="version: no version"):
        wire.decode_worker(msgpack.packb(fields))
