"""Attention masks of one decoder pass of ten predictions: factored, or full masks that are built and then resized.

Factored: the pixel features are resized once per level, and each prediction multiplies its embeddings with them and takes the sign.
Full: each prediction builds all masks at a quarter of the image's size, resizes them and cuts their probability at 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Cost, Form, Target, compiled
from gresbox.blocks import attention_mask_logits, downsample_pixels

SIZES = {"S": 10, "N": 100, "C": 256, "H": 120}
CASES = {f"B={batch}": {"B": batch, **SIZES} for batch in (1, 4, 32)}
ON = {"cpu": ("B=1", "B=4"), "cuda": ("B=32", "B=4", "B=1")}
DIFFERENTIABLE = ()
SHARES = (8, 4, 2)  # the levels' strides over that of the pixel features, lowest resolution first


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    embeddings = torch.randn(case["S"], case["B"], case["N"], case["C"], generator=generator, device=device)
    pixels = torch.randn(case["B"], case["C"], case["H"], case["H"], generator=generator, device=device)
    return {"embeddings": embeddings.to(dtype), "pixels": pixels.to(dtype)}


def factored(embeddings: Tensor, pixels: Tensor) -> list[Tensor]:
    """``embeddings`` (steps, B, N, C), ``pixels`` (B, C, H, W) -> per step (B, N, h * w) bool, True = may read."""
    levels = [downsample_pixels(pixels, (pixels.shape[-2] // share, pixels.shape[-1] // share)) for share in SHARES]
    return [attention_mask_logits(step, levels[index % len(levels)]) >= 0 for index, step in enumerate(embeddings)]


def full(embeddings: Tensor, pixels: Tensor) -> list[Tensor]:
    """The same by resizing the masks, as Mask2Former does."""
    masks = []
    for index, step in enumerate(embeddings):
        built = torch.einsum("bnc,bchw->bnhw", step, pixels)
        size = [side // SHARES[index % len(SHARES)] for side in built.shape[-2:]]
        resized = F.interpolate(built, size=size, mode="bilinear", align_corners=False)
        masks.append(resized.sigmoid().flatten(2) >= 0.5)
    return masks


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {
        "gresbox": factored,
        "gresbox, compiled": compiled(factored),
        "full masks": full,
        "full masks, compiled": compiled(full),
    }


def reference(embeddings: Tensor, pixels: Tensor) -> list[Tensor]:
    return full(embeddings, pixels)


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    areas = [(case["H"] // SHARES[index % 3]) ** 2 for index in range(case["S"])]
    flops = 2 * case["B"] * case["N"] * case["C"] * sum(areas)
    return Cost(flops=flops, bytes=case["B"] * (case["C"] * case["H"] ** 2 * itemsize + case["N"] * sum(areas)))


TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}  # the share of signs that may differ: those of logits that round to zero
TARGETS = [
    Target("gresbox", "full masks", "B=1", "forward", at_least=2.5),
    Target("gresbox", "full masks", "B=4", "forward", at_least=2.5),
]
