"""Token sequences of different lengths as one array, padded to few different shapes."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

PAD_TO = 32
"""mlx_lm's own multiple, plus one token: the first token is only input, the last only target."""
FINE_SHAPES = 24
"""Most shapes that mlx_lm's padding may make before it gets coarser: mx.compile and the allocator keep each."""
STEPS_PER_DOUBLING = 8
"""Coarser shapes per doubling: neighbours differ by at most an eighth, so padding adds at most 12.5 %."""


def pad(samples: Sequence[tuple[Sequence[int], int]], max_seq_length: int) -> tuple[mx.array, mx.array]:
    """The batch of `(tokens, prompt length)`, shortest first as in mlx_lm, and rows of (from, to) for its loss.

    Padded with zeros, which have no weight in `default_loss`. Sequences are cut to `max_seq_length`.
    """
    ordered = sorted(samples, key=lambda sample: len(sample[0]))
    lengths = [min(len(tokens), max_seq_length) for tokens, _ in ordered]
    batch = np.zeros((len(ordered), width(max(lengths), max_seq_length)), np.int32)
    for row, (tokens, _), length in zip(batch, ordered, lengths, strict=True):
        row[:length] = tokens[:length]
    spans = [(offset, length) for (_, offset), length in zip(ordered, lengths, strict=True)]
    return mx.array(batch), mx.array(spans)


def width(longest: int, max_seq_length: int) -> int:
    """Tokens that a batch is padded to: as in mlx_lm, or coarser where that would make many shapes.

    Depends on these two numbers only, so a resumed run pads like an uninterrupted one.
    """
    step = PAD_TO
    if max_seq_length > FINE_SHAPES * PAD_TO:
        while longest > 2 * STEPS_PER_DOUBLING * step:
            step *= 2
    return min(1 + step * -(-longest // step), max_seq_length)
