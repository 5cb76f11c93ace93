"""A LoRA fine-tune on random tokens, both as a task of the worker and through mlx_lm's own training loop.

Both use the same model, the same samples in the same batches, and the same padding. Nothing is downloaded: weights and
tokens are random, which does not change the time of a step.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import slices
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_worker.data import padding
from mlx_worker.data.batches import EffectiveBatches
from mlx_worker.task import Task

LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
"""mlx_lm.lora's defaults, like the number of layers and the learning rate below."""
LAYERS, LEARNING_RATE = 16, 1e-5
SEED = 7
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256,
    "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 258, "tie_word_embeddings": True,
}  # fmt: skip
MICRO_LLAMA = LLAMA | {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
TINY_QWEN3 = QWEN3 | {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
SHAPES = {"llama": LLAMA, "micro-llama": MICRO_LLAMA, "qwen3": QWEN3, "tiny-qwen3": TINY_QWEN3}


def samples(vocabulary: int, length: int, varied: bool, count: int) -> list[tuple[list[int], int]]:
    """Token sequences without a prompt, of `length` tokens or, if `varied`, of an eighth of `length` up to `length`."""
    generator = np.random.default_rng(SEED)
    lengths = generator.integers(max(2, length // 8), length + 1, count) if varied else [length] * count
    return [(generator.integers(1, vocabulary, int(one)).tolist(), 0) for one in lengths]


def adapted_model(shape: str) -> Any:
    """The model with LoRA layers and random weights; the shape `qwen3`, meant for a GPU, is in bfloat16."""
    config = SHAPES[shape]
    if config["model_type"] == "qwen3":
        from mlx_lm.models import qwen3 as architecture
    else:
        from mlx_lm.models import llama as architecture  # type: ignore[no-redef]
    mx.random.seed(SEED)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    if shape == "qwen3":
        model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    model.freeze()
    linear_to_lora_layers(model, min(LAYERS, len(model.layers)), LORA)
    mx.eval(model.parameters())
    return model


def build(shape: str = "llama", length: int = 64, varied: bool = False, count: int = 256) -> Task:
    """The fine-tune as a `Task`."""
    counter = slices.counter()

    def collate(chosen: list[Any]) -> tuple[mx.array, mx.array]:
        if counter is not None:
            counter.increase()
        return padding.pad(chosen, _longest(length))

    return Task(
        model=adapted_model(shape),
        optimizer=optim.Adam(learning_rate=LEARNING_RATE),
        loss=trainer.default_loss,
        dataset=samples(int(SHAPES[shape]["vocab_size"]), length, varied, count),
        collate=collate,
        fingerprint=f"{shape} {length} {varied} {count}",
    )


def _longest(length: int) -> int:
    return length + 1  # mlx_lm pads 512 tokens to 513, so that 512 are predicted


class Listener(trainer.TrainingCallback):  # type: ignore[misc]
    """Records the time of each report, which comes after its step has been computed."""

    def __init__(self) -> None:
        self.at_s: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.cache_bytes = 0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.at_s[train_info["iteration"]] = time.perf_counter()
        self.losses[train_info["iteration"]] = train_info["train_loss"]
        self.cache_bytes = max(self.cache_bytes, mx.get_cache_memory())


def train_with_mlx_lm(
    shape: str, length: int, varied: bool, count: int, batch: int, steps: int, every: int, own_order: bool = False
) -> dict[str, Any]:
    """`mlx_lm.tuner.train` with its defaults. `own_order`: its own batches, sorted by length."""
    model = adapted_model(shape)
    dataset = samples(int(SHAPES[shape]["vocab_size"]), length, varied, count)
    order = EffectiveBatches(count, SEED)

    counter = slices.counter()

    def same_batches(**_options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        while True:
            if counter is not None:
                counter.increase()
            chosen = [dataset[i] for i in order.next(batch)]
            yield next(trainer.iterate_batches(chosen, batch, _longest(length)))

    listener = Listener()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=batch, iters=steps, steps_per_report=every, max_seq_length=_longest(length),
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )  # fmt: skip
        batches = trainer.iterate_batches if own_order else same_batches
        trainer.train(
            model, optim.Adam(learning_rate=LEARNING_RATE), dataset, None, arguments,
            iterate_batches=batches, training_callback=listener,
        )  # fmt: skip
    return {
        "at_s": listener.at_s, "losses": listener.losses,
        "peak_bytes": mx.get_peak_memory(), "cache_bytes": listener.cache_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    result = train_with_mlx_lm(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(result))
