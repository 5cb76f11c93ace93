"""A Llama of several layers on longish sequences, where most of an update's memory is activations."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_llama import CONFIG

from mlx_worker.task import EvaluationContext, Task

LAYERS, LENGTH = 4, 128


def build(seed: int, dropout: float = 0.0, how: str = "layers", evaluate_every: int = 0) -> Task:
    """`how`: who can turn on gradient checkpointing: the worker ("layers") or the task ("own"); "done": it is on."""
    config = CONFIG | {"num_hidden_layers": LAYERS}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    if dropout:
        model.freeze()
        linear_to_lora_layers(model, LAYERS, {"rank": 4, "scale": 10.0, "dropout": dropout})
    if how == "done":
        grad_checkpoint(model.layers[0])

    def collate(samples: list[int]) -> tuple[mx.array, mx.array]:
        tokens = [[(31 * sample + 7 * i * i) % 256 for i in range(LENGTH)] for sample in samples]
        return mx.array(tokens), mx.array([[0, LENGTH - 8 * (sample % 4)] for sample in samples])

    def evaluate(model: Any, context: EvaluationContext) -> float:
        loss, _ = default_loss(model, *collate([1, 2]))
        return float(loss.item())

    def by_hand() -> None:
        print("by hand")
        grad_checkpoint(model.layers[0])

    return Task(
        model=model,
        optimizer=optim.Adam(learning_rate=1e-3),
        loss=default_loss,
        dataset=range(64),
        collate=collate,
        evaluate=evaluate,
        evaluate_every_steps=evaluate_every,
        checkpoint_gradients={"own": by_hand, "wrong": True}.get(how),  # type: ignore[arg-type]
        fingerprint="squares",
    )
