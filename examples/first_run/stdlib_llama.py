"""A small Llama learns the source of the running Python's standard library, byte by byte: no download needed.

Copy this file for your own training: the loop needs only the `Task` that `build` returns.
"""

import hashlib
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx_lm.models.llama import Model, ModelArgs

from mlx_worker.task import Task

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BYTES = 256  # the vocabulary: every byte is a token


class Windows:
    """Samples: the text cut into windows of `length` + 1 bytes; the last byte of each is the first of the next."""

    def __init__(self, text: npt.NDArray[np.uint8], length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.length)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        return self.text[index * self.length : (index + 1) * self.length + 1]


def build(hidden: int = 64, layers: int = 2, heads: int = 4, length: int = 96, learning_rate: float = 1e-3) -> Task:
    """The model, the optimizer, the data and the loss. The arguments come from [runs.NAME.task.args]."""
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=4 * hidden,
            num_attention_heads=heads,
            rms_norm_eps=1e-5,
            vocab_size=BYTES,
            tie_word_embeddings=True,
        )
    )
    text = read_standard_library()
    dataset = Windows(np.frombuffer(text, np.uint8), length)
    print(f"{len(text) / 2**20:.1f} MiB of Python source, {len(dataset):,} samples of {length} bytes", flush=True)
    return Task(
        model=model,
        optimizer=optim.AdamW(learning_rate=learning_rate),
        loss=loss,
        dataset=dataset,
        collate=collate,
        fingerprint=hashlib.sha256(text).hexdigest(),  # another Python has other data: a checkpoint is refused
    )


def read_standard_library() -> bytes:
    """All source files of the running Python's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [name for name in names if not SKIPPED_FOLDERS.intersection(name.split("/"))]
    if not chosen:
        raise FileNotFoundError(f"no Python source in {root}: this Python installation has none")
    return b"\n".join((root / name).read_bytes() for name in chosen)


def collate(samples: list[npt.NDArray[np.uint8]]) -> tuple[mx.array]:
    """The arrays of one micro-batch; `loss` gets them after the model."""
    return (mx.array(np.stack(samples)),)


def loss(model: nn.Module, windows: mx.array) -> tuple[mx.array, mx.array]:
    """The mean loss of the next byte, and the number of bytes in the mean, which weights the micro-batch."""
    inputs, targets = windows[:, :-1].astype(mx.int32), windows[:, 1:].astype(mx.int32)
    return nn.losses.cross_entropy(model(inputs), targets, reduction="mean"), mx.array(targets.size)
