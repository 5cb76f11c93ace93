"""Batches are padded as in mlx_lm; where that makes many shapes, a little more, which changes no loss."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, iterate_batches

from mlx_worker.data import padding
from mlx_worker.training.gradients import SHAPES_LIMIT


def made(lengths, offset=0):
    generator = np.random.default_rng(3)
    return [(generator.integers(1, 50, length).tolist(), min(offset, length - 1)) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [([5], 64), ([31, 32, 33], 768), ([40, 2, 17], 64), ([90, 80], 64), ([500, 30], 512), ([512, 9], 2048), ([2], 2)],
)
def test_the_same_array_as_mlx_lm(lengths, limit):
    samples = made(lengths, offset=3)
    padded = padding.pad(samples, limit)
    theirs = next(iterate_batches(samples, len(samples), limit))
    for mine, other in zip(padded, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert mx.array_equal(mine, other).item()


@pytest.mark.parametrize("limit", [32, 500, 768])
def test_short_limits_pad_as_mlx_lm_at_every_length(limit):
    for longest in range(2, limit + 1):
        assert padding.width(longest, limit) == min(1 + 32 * ((longest + 31) // 32), limit)


@pytest.mark.parametrize("limit", [769, 2048, 32_768])
def test_long_limits_make_few_shapes_for_an_eighth_of_padding(limit):
    widths = [padding.width(longest, limit) for longest in range(2, limit + 1)]
    assert widths == sorted(widths)
    assert len(set(widths)) <= 16 + 8 * np.log2(limit / 512) + 1
    for longest, width in enumerate(widths, 2):
        mlx_lm = min(1 + 32 * ((longest + 31) // 32), limit)
        assert mlx_lm <= width <= max(mlx_lm, 1 + 1.125 * longest)
    assert len(set(widths)) <= SHAPES_LIMIT, "all fit into what mx.compile is allowed"


def test_more_padding_changes_neither_loss_nor_gradients():
    """Attention is causal: padding comes after all tokens that count."""
    from mlx_lm.models import llama

    arguments = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(arguments))
    samples = made([1030, 900], offset=4)
    fine, coarse = next(iterate_batches(samples, 2, 2048)), padding.pad(samples, 2048)
    assert coarse[0].shape[1] > fine[0].shape[1]
    value_and_grad = nn.value_and_grad(model, default_loss)
    (fine_loss, fine_tokens), fine_gradients = value_and_grad(model, *fine)
    (coarse_loss, coarse_tokens), coarse_gradients = value_and_grad(model, *coarse)
    assert coarse_tokens.item() == fine_tokens.item()
    assert coarse_loss.item() == pytest.approx(fine_loss.item(), abs=1e-6)
    for (name, coarse_one), (_, fine_one) in zip(
        tree_flatten(coarse_gradients), tree_flatten(fine_gradients), strict=True
    ):
        assert mx.allclose(coarse_one, fine_one, atol=1e-6).item(), name
