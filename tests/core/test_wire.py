"""The wire: messages arrive unchanged, and no frame does more harm than a `WireError`.

The product packs frames with the package msgpack; the independent peer here is msgspec's msgpack.
"""

import math
import struct
import tracemalloc
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect
from msgspec.msgpack import Ext
from msgspec.msgpack import decode as peer_decode
from msgspec.msgpack import encode as peer_encode
from tests.training import jobs

from mlx_supervisor import wire
from mlx_worker.checkpoint import manifest as manifest_file

WORKER, SUPERVISOR = get_args(wire.WorkerMessage), get_args(wire.SupervisorMessage)


NUMBERS: dict[type, Any] = {inspect.IntType: st.integers, inspect.FloatType: st.floats}


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have."""
    match kind:
        case inspect.IntType() | inspect.FloatType():
            return NUMBERS[type(kind)](kind.ge, kind.le)
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
        case inspect.DictType():
            keys, values = _values(kind.key_type), _values(kind.value_type)
            return st.dictionaries(keys.filter(bool), values, max_size=min(kind.max_length or 4, 4))
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
    return dict(peer_decode(wire.encode(message)))


workers, supervisors = _messages(WORKER), _messages(SUPERVISOR)
A_PHASE = wire.PhaseChange(run="night", generation=3, seq=9, phase="eval", detail="batch 4")


@given(workers)
def test_a_workers_message_arrives(message: wire.WorkerMessage) -> None:
    assert _same(msgspec.structs.asdict(wire.decode_worker(wire.encode(message))), msgspec.structs.asdict(message))


@given(supervisors)
def test_a_supervisors_message_arrives(message: wire.SupervisorMessage) -> None:
    assert wire.decode_supervisor(wire.encode(message)) == message


@given(workers | supervisors)
def test_another_library_reads_the_frames(message: wire.Message) -> None:
    read = _plain(message)
    kind = read.pop("type")
    assert kind == inspect.type_info(type(message)).tag  # type: ignore[attr-defined]
    assert read["v"] == wire.VERSION
    assert _same({"type": kind} | read, msgspec.to_builtins(message))


@given(workers, st.randoms())
def test_frames_of_another_library_are_read_in_any_order_of_keys(message: wire.WorkerMessage, chance: Any) -> None:
    items = list(_plain(message).items())
    chance.shuffle(items)
    frame = peer_encode(dict(items))
    assert _same(msgspec.structs.asdict(wire.decode_worker(frame)), msgspec.structs.asdict(message))


@given(st.binary(max_size=300))
def test_noise_is_a_wire_error(noise: bytes) -> None:
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
    found = _read(peer_encode(fields))
    if isinstance(found, wire.WireError):
        assert len(str(found)) < 1000
    else:
        assert wire.decode_worker(wire.encode(found)) is not None


@given(st.dictionaries(st.text(max_size=8) | st.integers(0, 9), anything, max_size=4) | anything)
def test_well_formed_values_that_are_no_message_are_refused(value: Any) -> None:
    for decode in (wire.decode_worker, wire.decode_supervisor):
        with pytest.raises(wire.WireError):
            decode(peer_encode(value))


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", None, 1.5, [1], 2**63])
def test_another_version_is_named(version: Any) -> None:
    frame = peer_encode(_plain(A_PHASE) | {"v": version})
    with pytest.raises(wire.WireError, match=r"expected 1|`\$\.v`"):
        wire.decode_worker(frame)


def test_another_version_with_other_fields_is_still_named_as_another_version() -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(peer_encode(_plain(A_PHASE) | {"v": 2, "type": "mood", "colour": "blue"}))
    assert caught.value.kind == "version"


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(peer_encode(_plain(A_PHASE) | {"colour": "blue"}))
    assert caught.value.kind == "type"


def test_an_oversized_frame_is_not_read() -> None:
    padded = wire.encode(A_PHASE) + b"\xc0" * wire.FRAME_LIMIT_BYTES
    for decode in (wire.decode_worker, wire.decode_supervisor):
        with pytest.raises(wire.WireError) as caught:
            decode(padded)
        assert caught.value.kind == "oversized"
    with pytest.raises(wire.WireError) as caught:
        wire.encode(wire.PhaseChange(run="a", generation=1, seq=1, phase="eval", detail="x" * wire.FRAME_LIMIT_BYTES))
    assert caught.value.kind == "oversized"


def test_deep_nesting_does_no_harm() -> None:
    for frame in (b"\x91" * 60_000, b"\x81\xa1v" * 20_000):
        with pytest.raises(wire.WireError) as caught:
            wire.decode_worker(frame)
        assert caught.value.kind == "malformed"
    for depth in (10, 500, 900, 1000):  # read by msgpack, but too deep to show
        for head, kind in ((b"\x81\xa1v", "version"), (b"\x82\xa1v\x01\xa4type", "type")):
            with pytest.raises(wire.WireError) as caught:
                wire.decode_worker(head + b"\x91" * depth + b"\xc0")
            assert caught.value.kind in (kind, "malformed")


LENGTHS = [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]  # array, map, string, binary, extension: 32 bits of length


@pytest.mark.parametrize("head", LENGTHS, ids=bytes.hex)
def test_a_declared_length_allocates_nothing(head: bytes) -> None:
    for length in (2**32 - 1, 60_000):
        frame = (head + struct.pack(">I", length)) * 1000
        tracemalloc.start()
        try:
            with pytest.raises(wire.WireError) as caught:
                wire.decode_worker(frame)
            assert tracemalloc.get_traced_memory()[1] < 2 * len(frame) + 100_000
        finally:
            tracemalloc.stop()
        assert caught.value.kind == "malformed"


MALFORMED = {
    "a key twice": b"\x82\xa1v\x01\xa1v\x01",
    "a byte after the map": wire.encode(A_PHASE) + b"\xc0",
    "a second map": wire.encode(A_PHASE) * 2,
    "invalid UTF-8": wire.encode(A_PHASE).replace(b"batch", b"\xffatch"),
    "a key that is a number": peer_encode(_plain(A_PHASE) | {7: 1}),
    "an extension": peer_encode(_plain(A_PHASE) | {"detail": Ext(5, b"x")}),
    "an empty extension": peer_encode(_plain(A_PHASE) | {"detail": Ext(5, b"")}),
    "a timestamp": peer_encode(_plain(A_PHASE) | {"detail": datetime(2026, 1, 1, tzinfo=UTC)}),
    "an array of 300": peer_encode(_plain(A_PHASE) | {"detail": [1] * 300}),
    "a byte that begins nothing": b"\xc1",
    "nothing": b"",
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_frame_is_an_error_of_that_kind(frame: bytes) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(frame)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize(
    "change", [{"type": "mood"}, {"type": None}, {"type": ["phase"]}, {"type": {}}, {"type": "stop"}], ids=str
)
def test_an_unknown_message_type_is_a_type_error(change: dict[str, Any]) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_worker(peer_encode(_plain(A_PHASE) | change))
    assert caught.value.kind == "type"


def test_a_key_in_bytes_is_a_type_error() -> None:
    frame = wire.encode(A_PHASE).replace(b"\xa6detail", b"\xc4\x06detail")
    with pytest.raises(wire.WireError):
        wire.decode_worker(frame)


def test_only_a_type_that_the_sender_may_send_is_read() -> None:
    with pytest.raises(wire.WireError):
        wire.decode_supervisor(wire.encode(A_PHASE))


@pytest.mark.parametrize(
    "message",
    [
        wire.PhaseChange(run="a", generation=1, seq=1, phase="eval", detail="half a \ud800 character"),
        wire.PhaseChange(run="a", generation=1, seq=2**70, phase="eval"),
    ],
    ids=["surrogate", "number over 64 bits"],
)
def test_a_message_that_msgpack_cannot_hold_is_a_wire_error_and_the_next_is_fine(message: wire.Message) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(message)
    assert wire.decode_worker(wire.encode(A_PHASE)) == A_PHASE


@pytest.mark.parametrize(("field", "value"), [
    ("run", ""), ("run", "../x"), ("run", "a b"), ("run", "night\n"), ("run", "x" * 65), ("run", ".night"),
    ("generation", -1), ("seq", 2**63), ("phase", "lunch"), ("detail", "x" * 513), ("detail", b"\xff"),
    ("generation", 1.5), ("generation", True),
])  # fmt: skip
def test_a_value_out_of_bounds_is_named(field: str, value: Any) -> None:
    with pytest.raises(wire.WireError, match=rf"\$\.{field}") as caught:
        wire.decode_worker(peer_encode(_plain(A_PHASE) | {field: value}))
    assert caught.value.kind == "type"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_duration_that_is_no_finite_number_from_zero_is_refused(seconds: float) -> None:
    """Deadlines are made from durations: a NaN would switch the hang detection off."""
    fields = _plain(wire.Checkpoint(run="a", generation=1, seq=1, step=1, ok=True, seconds=1, stall_s=1, size_bytes=1))
    with pytest.raises(wire.WireError):
        wire.decode_worker(peer_encode(fields | {"seconds": seconds}))


def test_a_loss_that_is_nan_arrives() -> None:
    message = wire.Bye(run="a", generation=1, seq=1, outcome="failed", reason="", step=1, loss=float("nan"))
    read = wire.decode_worker(wire.encode(message))
    assert isinstance(read, wire.Bye)
    assert read.loss is not None
    assert math.isnan(read.loss)


def test_a_manifest_survives_a_round_trip_and_names_only_plain_files() -> None:
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


def test_oversized_json_is_not_read() -> None:
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


def test_a_job_survives_a_round_trip() -> None:
    job = jobs.job(run="a", run_dir="/x", task={"args": {"n": [1]}})
    assert wire.load_job(wire.dump_json(job)) == job


def test_a_frame_without_a_version_is_refused() -> None:
    fields = _plain(A_PHASE)
    del fields["v"]
    with pytest.raises(wire.WireError, match="version: found None"):
        wire.decode_worker(peer_encode(fields))
