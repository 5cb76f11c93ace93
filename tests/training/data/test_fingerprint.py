"""Fingerprints depend on content alone, notice a change in any tensor, and read a large file in bounded time."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_worker.tasks import fingerprint


def write(path, tensors, filler=0):
    """A safetensors file of zeros: each tensor has `filler` bytes, and those of `tensors` their own value."""
    header, offset = {}, 0
    for name in tensors:
        header[name] = {"dtype": "U8", "shape": [filler], "data_offsets": [offset, offset + filler]}
        offset += filler
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(bytes([value]) * 16)
            file.seek(filler - 16, 1)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize("filler", [1000, 10 * 2**20])
def test_a_changed_tensor_or_header_is_noticed_and_a_name_means_nothing(tmp_path, filler):
    tensors = {"a": 1, "b": 2, "c": 3}
    digests = []
    for index, values in enumerate((tensors, tensors, tensors | {"b": 9}, tensors | {"d": 0})):
        folder = tmp_path / str(index)
        folder.mkdir()
        write(folder / f"model{index}.safetensors", values, filler)
        digests.append(fingerprint.of_weights(folder, tmp_path / "cache.json"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_what_is_unchanged_is_not_read_again(tmp_path, monkeypatch):
    write(tmp_path / "model.safetensors", {"a": 1}, 1000)
    cache = tmp_path / "cache.json"
    first = fingerprint.of_weights(tmp_path, cache)
    monkeypatch.setattr(fingerprint, "of_file", lambda path: pytest.fail("read again"))
    assert fingerprint.of_weights(tmp_path, cache) == first
    cache.write_text("damaged")
    monkeypatch.undo()
    assert fingerprint.of_weights(tmp_path, cache) == first
    write(tmp_path / "model.safetensors", {"a": 2}, 1000)
    assert fingerprint.of_weights(tmp_path, cache) != first


def test_frozen_arrays_by_content():
    arrays = {"w": mx.zeros((100, 100), dtype=mx.bfloat16), "scalar": mx.array(1.0), "empty": mx.zeros((0,))}
    same = {name: mx.array(value) for name, value in arrays.items()}
    assert fingerprint.of_arrays(arrays) == fingerprint.of_arrays(same)
    changed = np.zeros((100, 100), dtype=np.float32)
    changed[50, 0] = 1
    assert fingerprint.of_arrays(arrays | {"w": mx.array(changed).astype(mx.bfloat16)}) != fingerprint.of_arrays(arrays)
    assert fingerprint.of_arrays({}) == ""
