"""Hiding a random part of the weak blocks, from similarity to masked picture, against AMLRIS's patches and loop over samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Form, Target, compiled
from benchmarks.peers.alignment_masking import hide_by_patches
from gresbox.ops import filter_blocks

SIZES = {"S": 448, "patches": 14, "block": 32}
CASES = {"B=8": {"B": 8, **SIZES}, "B=1": {"B": 1, **SIZES}, "B=32": {"B": 32, **SIZES}}
ON = {"cpu": ("B=8", "B=1"), "cuda": ("B=32", "B=8", "B=1")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ()
THRESHOLD, DROP = 0.4, 0.25


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Similarities that leave about 80 % of the patches weak, as the default scale does for twenty words."""
    drawn = partial(torch.rand, generator=generator, device=device, dtype=dtype)
    blocks = case["S"] // case["block"]
    return {
        "images": torch.randn(case["B"], 3, case["S"], case["S"], generator=generator, device=device, dtype=dtype),
        "similarity": 0.5 * drawn(case["B"], case["patches"], case["patches"]),
        "noise": drawn(case["B"], blocks, blocks),
        "pixel_noise": drawn(case["B"], case["S"], case["S"]),
    }


def hide(images: Tensor, similarity: Tensor, noise: Tensor, pixel_noise: Tensor, *, mode: str = "exact") -> Tensor:
    size = (images.shape[-2], images.shape[-1])
    removed = filter_blocks(similarity, size, threshold=THRESHOLD, drop=DROP, mode=mode, noise=noise)
    return torch.where(removed[:, None], 0.0, images)


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def loop(images: Tensor, similarity: Tensor, noise: Tensor, pixel_noise: Tensor) -> Tensor:
        return hide_by_patches(images, similarity, noise.flatten(1), unit="block", threshold=THRESHOLD, drop=DROP)

    def loop_by_pixel(images: Tensor, similarity: Tensor, noise: Tensor, pixel_noise: Tensor) -> Tensor:
        return hide_by_patches(images, similarity, pixel_noise, unit="pixel", threshold=THRESHOLD, drop=DROP)

    return {
        "gresbox": hide,
        "gresbox, each block by itself": Form(partial(hide, mode="bernoulli"), differs="another number of blocks per picture"),
        "gresbox, compiled": compiled(hide),
        "patches and a loop": loop,
        "AMLRIS, by pixel": Form(loop_by_pixel, differs="draws among the weak pixels, as the paper prints it"),
    }


def reference(images: Tensor, similarity: Tensor, noise: Tensor, pixel_noise: Tensor) -> Tensor:
    """Block by block, in Python."""
    size, block = images.shape[-1], images.shape[-1] // noise.shape[-1]
    smooth = F.interpolate(similarity[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    masked = images.clone()
    for sample, picture in enumerate(masked):
        tiles = [(row, column) for row in range(size // block) for column in range(size // block)]
        spans = {tile: tuple(slice(block * place, block * (place + 1)) for place in tile) for tile in tiles}
        weak = [tile for tile in tiles if (smooth[sample][spans[tile]] < THRESHOLD).any()]
        weak.sort(key=lambda tile: noise[sample][tile].item())
        for tile in weak[: int(DROP * len(weak))]:
            picture[(slice(None), *spans[tile])] = 0
    return masked


TARGETS = [
    Target("gresbox", "AMLRIS, by pixel", "B=8", "forward", at_least=20.0),
    Target("gresbox, each block by itself", "AMLRIS, by pixel", "B=8", "forward", at_least=20.0),
]
