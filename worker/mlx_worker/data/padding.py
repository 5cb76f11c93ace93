"""Token sequences of different lengths as one array, padded so that few different shapes occur."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

PAD_TO = 32
"""mlx_lm's own multiple; one more token is padded, as the first predicts and the last is only predicted."""
FINE_SHAPES = 24
"""As many shapes as mlx_lm's padding may make before it is made coarser: mx.compile and the allocator keep each."""
STEPS_PER_DOUBLING = 8
"""Of the coarser shapes: neighbours lie at most an eighth apart, so at most 12.5 % more is padded."""


def pad(samples: Sequence[tuple[Sequence[int], int]], max_seq_length: int) -> tuple[mx.array, mx.array]:
    """The batch of `(tokens, prompt length)`, shortest first as mlx_lm sorts them, and rows of (from, to) for its loss.

    Zeros are padded, which `default_loss` gives no weight. Sequences are cut to `max_seq_length`.
    """
    ordered = sorted(samples, key=lambda sample: len(sample[0]))
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in ordered]
    batch = np.zeros((len(ordered), width(max(lengths), max_seq_length)), np.int32)
    for row, (tokens, _), length in zip(batch, ordered, lengths, strict=True):
        row[:length] = tokens[:length]
    spans = [(offset, length) for (_, offset), length in zip(ordered, lengths, strict=True)]
    return mx.array(batch), mx.array(spans)


def width(longest: int, max_seq_length: int) -> int:
    """Tokens that a batch is padded to: mlx_lm's number, or a coarser one where its padding would make many shapes.

    It depends on these two numbers alone, and on nothing that happened before: a resumed run must pad as the first did.
    """
    step = PAD_TO
    if max_seq_length > FINE_SHAPES * PAD_TO:
        while longest > 2 * STEPS_PER_DOUBLING * step:
            step *= 2
    return min(1 + step * -(-longest // step), max_seq_length)
