"""Two healthy fine-tunes of varied lengths, with evaluations, without a leak; `record_null.py` records them."""

from typing import Any

import lora_task
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models.llama import Model, ModelArgs

from mlx_worker.task import EvaluationContext, Task

EVALUATE_EVERY = 250
EVALUATION_BATCHES = 8


def lora(shape: str = "tiny-qwen3", length: int = 128) -> Task:
    """mlx_lm's LoRA on a frozen model; evaluated on batches of the longest samples, twice as large as in training."""
    task = lora_task.build(shape, length, varied=True, count=600)
    longest = sorted(range(len(task.dataset)), key=lambda i: len(task.dataset[i][0]))[-2 * EVALUATION_BATCHES :]

    def evaluate(model: Any, context: EvaluationContext) -> float:
        total = 0.0
        for i in range(EVALUATION_BATCHES):
            chosen = [task.dataset[longest[(i + k) % len(longest)]] for k in range(2 * context.batch_size)]
            value, _ = task.loss(model, *task.collate(chosen))
            total += value.item()
            context.progress()
        return total / EVALUATION_BATCHES

    task.evaluate, task.evaluate_every_steps = evaluate, EVALUATE_EVERY
    return task


def full(hidden: int = 32, length: int = 96) -> Task:
    """A full fine-tune of a small Llama with AdamW; lengths from an eighth up, padded to a multiple of 16."""
    model = Model(ModelArgs(
        model_type="llama", hidden_size=hidden, num_hidden_layers=1, intermediate_size=4 * hidden,
        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=256, tie_word_embeddings=True,
    ))  # fmt: skip
    dataset = [mx.array(tokens) for tokens, _ in lora_task.samples(256, length, True, 600)]

    def collate(chosen: list[mx.array]) -> tuple[mx.array]:
        width = -(-max(one.size for one in chosen) // 16) * 16
        return (mx.stack([mx.pad(one, (0, width - one.size)) for one in chosen]),)

    def loss(model: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = targets != 0
        each = nn.losses.cross_entropy(model(inputs), targets) * mask
        return each.sum() / mask.sum(), mask.sum()

    def evaluate(model: Any, context: EvaluationContext) -> float:
        total = 0.0
        for i in range(EVALUATION_BATCHES):
            value, _ = loss(
                model, *collate([dataset[(7 * i + k) % len(dataset)] for k in range(3 * context.batch_size)])
            )
            total += value.item()
            context.progress()
        return total / EVALUATION_BATCHES

    return Task(
        model=model, optimizer=optim.AdamW(learning_rate=1e-3), loss=loss, dataset=dataset, collate=collate,
        evaluate=evaluate, evaluate_every_steps=EVALUATE_EVERY, fingerprint=f"full {hidden} {length}",
    )  # fmt: skip
