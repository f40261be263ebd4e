"""How large a piece of an image the factored ops hold at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["chunks_of", "pieces_of"]

_CPU_VALUES, _DEVICE_VALUES = 2**19, 2**24
_CACHE_VALUES = 2**18  # in float32 the second-level cache of current processors


def chunks_of(pixels: int, maps: int, chunk: int, device: torch.device) -> Iterator[slice]:
    """Ranges of pixels; by default so many that, with ``maps`` values each, they fit a cache or fill a GPU, at most a quarter."""
    if chunk == 0:
        budget = _CPU_VALUES if device.type == "cpu" else _DEVICE_VALUES
        chunk = max(min(budget // max(maps, 1), -(-pixels // 4)), 1)
    return (slice(start, start + chunk) for start in range(0, pixels, chunk))


def pieces_of(batch: int, maps: int, pixels: int, chunk: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Images and pixels of each piece; by default several images, or part of one, whose ``maps`` fit a cache or fill a GPU."""
    if chunk:
        return ((slice(0, batch), slice(start, start + chunk)) for start in range(0, pixels, chunk))
    budget = _CACHE_VALUES if device.type == "cpu" else _DEVICE_VALUES
    images = max(1, budget // max(maps * pixels, 1))
    part = pixels if maps * pixels <= budget else max(1, budget // maps)
    return (
        (slice(image, image + images), slice(start, start + part))
        for image in range(0, batch, images)
        for start in range(0, pixels, max(part, 1))
    )
