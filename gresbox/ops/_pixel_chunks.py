"""How large a piece of an image the factored ops hold at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["chunks_of"]

_CPU_VALUES, _DEVICE_VALUES = 2**19, 2**24


def chunks_of(pixels: int, maps: int, chunk: int, device: torch.device) -> Iterator[slice]:
    """Ranges of pixels; by default so many that, with ``maps`` values each, they fit a cache or fill a GPU, at most a quarter."""
    if chunk == 0:
        budget = _CPU_VALUES if device.type == "cpu" else _DEVICE_VALUES
        chunk = max(min(budget // max(maps, 1), -(-pixels // 4)), 1)
    return (slice(start, start + chunk) for start in range(0, pixels, chunk))
