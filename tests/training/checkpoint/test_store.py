"""Acknowledged checkpoints load exactly as saved, and damaged ones never load."""

import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_supervisor import wire
from mlx_worker.checkpoint import durable_files, exact_json, rng_state
from mlx_worker.checkpoint.store import CheckpointError, CheckpointStore, SavedCheckpoint, weights_sha256

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json")


def weights(step: int) -> dict[str, mx.array]:
    return {
        "layers.0.weight": mx.arange(64, dtype=mx.float32).reshape(8, 8).T + step,
        "layers.1.weight": mx.full((3, 5), step, dtype=mx.bfloat16),
    }


def moments(step: int) -> dict[str, mx.array]:
    return {"step": mx.array(step, mx.uint64), "learning_rate": mx.array(0.1), "layers.0.weight.m": mx.ones((2, 2))}


def save(store: CheckpointStore, step: int) -> SavedCheckpoint:
    return store.save(step, weights(step), moments(step), {"cursor": step * 8})


def same(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return weights_sha256(left) == weights_sha256(right)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, "run", 3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_arrays_load_bit_for_bit(store: CheckpointStore, folder: Path) -> None:
    trainer = {"cursor": 2**60, "losses": [float("nan"), float("inf"), -0.1], "rng": rng_state.capture(), "none": None}
    saved = store.save(7, weights(7), moments(7), trainer)
    loaded = CheckpointStore(folder, "run", 3).load_newest()
    assert loaded is not None
    assert (loaded.step, loaded.path) == (7, saved.path)
    assert same(loaded.trained, weights(7))
    assert same(loaded.optimizer, moments(7))
    assert loaded.optimizer["step"].shape == ()
    assert repr(loaded.trainer) == repr(trainer)  # repr: NaN is not equal to itself
    assert saved.size_bytes == sum(path.stat().st_size for path in saved.path.iterdir())


def test_arrays_outlive_their_file(store: CheckpointStore) -> None:
    """Loading is lazy in MLX: unevaluated arrays would read the file later, when it may be another."""
    save(store, 1)
    loaded = store.load_newest()
    assert loaded is not None
    os.truncate(loaded.path / "model.safetensors", 0)
    assert same(loaded.trained, weights(1))


def test_an_empty_optimizer_and_nothing_to_train_are_kept(store: CheckpointStore) -> None:
    store.save(1, {}, {}, {})
    loaded = store.load_newest()
    assert loaded is not None
    assert (loaded.trained, loaded.optimizer, loaded.trainer) == ({}, {}, {})


def test_a_fresh_folder_holds_nothing(store: CheckpointStore) -> None:
    assert store.load_newest() is None
    assert store.skipped == []


def test_only_the_owner_may_read(store: CheckpointStore, folder: Path) -> None:
    path = save(store, 1).path
    assert {stat.S_IMODE(where.stat().st_mode) for where in (folder, path)} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_the_newest_stay_and_older_ones_go(store: CheckpointStore, folder: Path) -> None:
    for step in (1, 2, 30, 400, 1_000_000_000):
        save(store, step)
    assert names(folder) == ["step-000000030", "step-000000400", "step-1000000000"]


def test_a_damaged_checkpoint_does_not_count_as_kept(store: CheckpointStore, folder: Path) -> None:
    """Otherwise two damaged checkpoints and one intact one would be kept."""
    for step in (1, 2, 3):
        (save(store, step).path / "MANIFEST.json").unlink() if step > 1 else save(store, step)
    save(store, 4)
    save(store, 5)
    assert "step-000000001" in names(folder)
    save(store, 6)
    assert names(folder) == ["step-000000004", "step-000000005", "step-000000006"]


def test_one_whose_content_is_damaged_does_not_count_once_it_was_skipped(store: CheckpointStore, folder: Path) -> None:
    save(store, 1)
    for step in (2, 3):
        flip(save(store, step).path / "model.safetensors", 0.9)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    save(store, 4)
    assert names(folder)[0] == "step-000000001"


def test_saving_a_step_again_leaves_the_good_one_alone(store: CheckpointStore) -> None:
    """After a resume the same step may be saved again, and it may be the only checkpoint."""
    path = save(store, 5).path
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}
    assert save(store, 5).path == path
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()} == before


def test_saving_a_step_again_replaces_a_damaged_one(store: CheckpointStore, folder: Path) -> None:
    file = save(store, 5).path / "model.safetensors"
    flip(file, 0.9)
    save(store, 5)
    loaded = store.load_newest()
    assert loaded is not None
    assert same(loaded.trained, weights(5))
    assert names(folder) == ["step-000000005"]


def flip(file: Path, where: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_never_loaded(store: CheckpointStore, name: str, where: float) -> None:
    save(store, 1)
    flip(save(store, 2).path / name, where)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert store.skipped == [f"step-000000002: {name} is damaged (its SHA-256 differs from the manifest)."]


def manifest(path: Path, **changes: Any) -> None:
    content = json.loads((path / "MANIFEST.json").read_bytes())
    (path / "MANIFEST.json").write_text(json.dumps({**content, **changes}))


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 20)


def link(path: Path) -> None:
    shutil.move(path / "trainer.json", path.parent.parent / "elsewhere.json")
    (path / "trainer.json").symlink_to(path.parent.parent / "elsewhere.json")


DAMAGES = {
    "cannot read MANIFEST.json: No such file": lambda path: (path / "MANIFEST.json").unlink(),
    "MANIFEST.json is invalid (malformed": lambda path: (path / "MANIFEST.json").write_text("{"),
    "MANIFEST.json is invalid (type": lambda path: (path / "MANIFEST.json").write_text("[1]"),
    "MANIFEST.json is invalid (oversized": lambda path: (path / "MANIFEST.json").write_text(" " * 2**19),
    "MANIFEST.json has version 2": lambda path: manifest(path, v=2, more="fields"),
    "belongs to run 'other', not to 'run'": lambda path: manifest(path, run="other"),
    "MANIFEST.json is for step 3": lambda path: manifest(path, step=3),
    "MANIFEST.json must list model.safetensors, optimizer.safetensors and trainer.json once each": lambda path: (
        manifest(path, files=[{"name": "model.safetensors", "size_bytes": 1, "sha256": "0" * 64}])
    ),
    "cannot read optimizer.safetensors: No such file": lambda path: (path / "optimizer.safetensors").unlink(),
    "model.safetensors has 20 bytes, the manifest says": truncate,
    "trainer.json is not a regular file": link,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_folder_that_is_no_checkpoint_is_skipped_with_the_reason(store: CheckpointStore, reason: str) -> None:
    save(store, 1)
    DAMAGES[reason](save(store, 2).path)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert len(store.skipped) == 1
    assert store.skipped[0].startswith(f"step-000000002: {reason}")


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(store: CheckpointStore, name: str) -> None:
    save(store, 1)
    path = save(store, 2).path
    (path / name).unlink()
    os.mkfifo(path / name)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert store.skipped[0].startswith(f"step-000000002: {name} ")


def test_junk_is_named_and_distinguished_from_checkpoints(store: CheckpointStore, folder: Path) -> None:
    save(store, 1)
    for name in ("step-2", "step-00000000002", "step-000000002.bak", "notes.txt"):
        (folder / name).touch()
    (folder / ".DS_Store").touch()
    (folder / "step-000000009").write_text("a file")
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert [sentence.split(":")[0] for sentence in store.skipped] == [
        "'notes.txt'",
        "'step-00000000002'",
        "'step-000000002.bak'",
        "'step-2'",
        "step-000000009",
    ]


def test_many_reasons_stay_within_what_a_message_holds(store: CheckpointStore, folder: Path) -> None:
    save(store, 1)
    for step in range(100, 200):
        (folder / f"step-{step:09d}").mkdir()
    assert store.load_newest() is not None
    wire.encode(
        wire.Ready(
            run="run", generation=1, seq=0, step=1, target_steps=1, batch_size=1, effective_batch=1,
            skipped=store.skipped,
        )
    )  # fmt: skip
    assert len(store.skipped) == 16
    assert store.skipped[-1].startswith("More were skipped")


@pytest.mark.parametrize("changes", [{"run": "other"}, {"v": 2}])
def test_a_foreign_folder_is_neither_replaced_nor_deleted(
    store: CheckpointStore, folder: Path, changes: dict[str, Any]
) -> None:
    path = save(store, 1).path
    manifest(path, **changes)
    for step in range(2, 7):
        save(store, step)
    assert names(folder) == ["step-000000001", "step-000000004", "step-000000005", "step-000000006"]


@pytest.mark.parametrize("changes", [{"run": "other"}, {"v": 2}])
def test_a_foreign_folder_is_renamed_when_its_step_is_saved(
    store: CheckpointStore, folder: Path, changes: dict[str, Any]
) -> None:
    """One flipped bit in a manifest can make it foreign: a run that stopped there could never end."""
    path = save(store, 1).path
    manifest(path, **changes)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (note,) = save(store, 1).notes
    renamed, _ = names(folder)
    assert note.startswith(f"renamed foreign folder step-000000001 to {renamed}: ")
    assert {file.name: file.read_bytes() for file in (folder / renamed).iterdir()} == before
    loaded = store.load_newest()
    assert loaded is not None
    assert same(loaded.trained, weights(1))
    assert store.skipped == [f"{renamed!r}: not a checkpoint's name."]


def test_a_file_that_may_not_be_opened_stops_the_load(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of descriptors is no damage: loading an older checkpoint would silently lose steps."""
    save(store, 1)
    save(store, 2)

    def refuse(path: Path) -> tuple[int, str]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(durable_files, "read_hash", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Too many open files \(EMFILE\)"):
        store.load_newest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_replace_good_ones(store: CheckpointStore, value: float) -> None:
    save(store, 1)
    broken = {**weights(2), "layers.1.weight": mx.array([1.0, value], mx.bfloat16)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.weight contains NaN or infinity"):
        store.save(2, broken, {}, {})
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        ({"a": {"b": [1, object()]}}, r"trainer.json: a.b\[1\]: a object cannot be stored"),
        ({"a": {1: 2}}, "a: key 1 is not allowed"),
        ({"a": {"$float": "nan"}}, r"key '\$float' is not allowed"),
        ({"a": "x" * 5_000_000}, "trainer.json has 5,000,0.. bytes, the limit is 4,194,304"),
    ],
)
def test_a_trainer_state_that_cannot_be_restored_exactly_is_refused(
    store: CheckpointStore, folder: Path, trainer: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        store.save(1, weights(1), {}, trainer)
    assert names(folder) == []


def test_the_trainer_state_is_json_that_any_reader_takes() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = exact_json.dumps({"loss": float("nan"), "best": float("-inf"), "pair": (1, 2)})
    assert json.loads(data, parse_constant=refuse)["pair"] == [1, 2]


def test_the_hash_of_weights_depends_on_name_type_shape_and_bytes() -> None:
    base = {"a": mx.array([1.0, 2.0], mx.bfloat16), "b": mx.array([[1, 2]])}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(mx.float16), "b": base["b"]},
        {"a": base["a"], "b": base["b"].reshape(2)},
        {"a": mx.array([1.0, 2.015625], mx.bfloat16), "b": base["b"]},
        {"a": base["a"]},
        {"a": mx.array([1.0, -0.0]), "b": base["b"]},
        {"a": mx.array([1.0, 0.0]), "b": base["b"]},
        {"a": mx.array(True), "b": mx.zeros((0, 2)), "c": mx.array(1 + 2j)},
    ]
    digests = {weights_sha256(case) for case in [base, *others]}
    assert len(digests) == len(others) + 1
    assert weights_sha256(dict(reversed(base.items()))) == weights_sha256(base)
    turned = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
    assert weights_sha256({"a": turned}) == weights_sha256({"a": mx.array(np.array(turned))})


def test_every_generator_continues_where_it_stopped() -> None:
    def draw() -> tuple[object, ...]:
        dropout = mx.random.bernoulli(0.5, (64,)).tolist()
        return dropout, mx.random.normal((3,)).tolist(), random.random(), random.gauss(), np.random.rand(3).tolist()

    draw()
    state = json.loads(json.dumps(rng_state.capture()))
    expected = [draw() for _ in range(3)]
    for _ in range(5):
        draw()
    rng_state.restore(state)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("state", [{}, {"mlx": [1]}, {"mlx": [1, 2], "python": None, "numpy": {}}])
def test_a_generator_state_of_another_shape_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the saved state of the random generators is invalid"):
        rng_state.restore(state)


def test_keep_0_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep must be at least 1, found 0"):
        CheckpointStore(folder, "run", 0)
