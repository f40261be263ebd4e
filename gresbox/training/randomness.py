"""The global generators of Python, NumPy and torch: seeded together, saved and put back together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["get_random_state", "seed_random", "set_random_state"]


def seed_random(seed: int) -> None:
    """Seed all three, on every device.

    Args:
        seed: Any whole number that is not negative.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third parties' data sets draw from the global generator
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """The state of all three (and of this process's GPU), as tensors and plain numbers.

    Example:
        >>> state = get_random_state()
        >>> first = random.random()
        >>> set_random_state(state)
        >>> random.random() == first
        True
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - as above
    name, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_random_state` took."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002 - as above
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
