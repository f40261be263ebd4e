"""Reading masks at random points and choosing uncertain ones, against transformers' Mask2Former."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, attempt, compiled, missing
from gresbox.ops import point_sample

CASES = {
    "100 masks": {"B": 1, "N": 100, "H": 120, "K": 12544},
    "32 x 100 masks": {"B": 32, "N": 100, "H": 120, "K": 12544},
}
ON = {"cpu": ("100 masks",), "cuda": ("32 x 100 masks", "100 masks")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ("masks",)


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = partial(torch.rand, generator=generator, device=device, dtype=dtype)
    return {"masks": drawn(case["B"], case["N"], case["H"], case["H"]) - 0.5, "points": drawn(case["B"], case["K"], 2)}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {
        "gresbox": point_sample,
        "gresbox, compiled": compiled(point_sample),
        "transformers": missing("transformers") or attempt(transformers_form),
    }


def transformers_form() -> Callable[..., Tensor]:
    from transformers.models.mask2former.modeling_mask2former import sample_point

    def call(masks: Tensor, points: Tensor) -> Tensor:
        """As its matcher does: every mask is a map of one channel with its own copy of the points."""
        repeated = points.repeat_interleave(masks.shape[1], 0)
        return sample_point(masks.flatten(0, 1)[:, None], repeated, align_corners=False)[:, 0].unflatten(0, masks.shape[:2])

    return call


def reference(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear interpolation written out."""
    height, width = masks.shape[-2:]
    place = points * points.new_tensor([width, height]) - 0.5  # (B, K, 2)
    low = place.floor().long()
    share = place - low
    total = masks.new_zeros(*masks.shape[:2], points.shape[1])
    for right in (0, 1):
        for down in (0, 1):
            x, y = low[..., 0] + right, low[..., 1] + down
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            weight = (share[..., 0] if right else 1 - share[..., 0]) * (share[..., 1] if down else 1 - share[..., 1]) * inside
            index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1))[:, None].expand(-1, masks.shape[1], -1)
            total = total + masks.flatten(2).gather(2, index) * weight[:, None]
    return total


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    passes = {"forward": 1, "backward": 1, "forward+backward": 2}[direction]
    values = case["B"] * case["N"] * case["K"]
    maps = case["B"] * case["N"] * case["H"] ** 2
    return Cost(flops=8 * passes * values, bytes=passes * (values + maps) * itemsize, cached_bytes=4 * passes * values * itemsize)
