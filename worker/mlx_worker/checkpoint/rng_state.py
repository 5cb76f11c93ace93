"""The states of all random generators that training may use: to JSON and back."""

import random
from typing import Any, cast

import mlx.core as mx
import numpy as np


def capture() -> dict[str, Any]:
    """The states of MLX's, Python's and numpy's (legacy, global) generators, ready for JSON.

    MLX keeps one key per thread: call this on the thread that trains.
    """
    key = [int(word) for word in np.array(cast(Any, mx.random.state)[0])]
    version, words, gauss = random.getstate()
    return {
        "mlx": key,
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": _plain(np.random.get_state(legacy=False)),
    }


def restore(state: dict[str, Any]) -> None:
    """Restore what `capture` returned, on the calling thread. Raises ValueError if the state has another shape."""
    try:
        high, low = state["mlx"]
        python, legacy = state["python"], state["numpy"]
        python_state = (python["version"], tuple(python["words"]), python["gauss"])
        key = (int(high) << 32) | int(low)
        random.setstate(python_state)
        np.random.set_state(legacy)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"rng: the saved state of the random generators is invalid: {error!r:.200}") from None
    mx.random.seed(key)  # the key itself is read-only; a seed of 64 bits becomes the key, word for word


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def seed_generators(seed: int) -> None:
    """Seed MLX's, Python's and numpy's generators."""
    mx.random.seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
