"""Target masks of a batch as one padded tensor at the predictions' size, against scaling and padding image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Form
from gresbox.ops import stack_masks

CASES = {
    "4 images": {"B": 4, "most": 10, "S": 480, "s": 120},
    "32 images": {"B": 32, "most": 10, "S": 480, "s": 120},
}
ON = {"cpu": ("4 images",), "cuda": ("32 images", "4 images")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ()


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    masks = []
    for index in range(case["B"]):
        coarse = torch.rand(index % (case["most"] + 1), 1, 12, 12, generator=generator, device=device)
        if len(coarse):
            coarse = F.interpolate(coarse, size=(case["S"], case["S"]), mode="bilinear")
        masks.append(coarse[:, 0] > 0.5 if len(coarse) else torch.zeros(0, case["S"], case["S"], dtype=torch.bool, device=device))
    return {"masks": masks, "side": case["s"]}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {"gresbox": lambda masks, side: stack_masks(masks, (side, side))[0], "one by one": one_by_one}


def one_by_one(masks: list[Tensor], side: int) -> Tensor:
    """As the padding of DETR and Mask2Former: a tensor of zeros, filled image by image; here with the area's mean."""
    most = max(len(mask) for mask in masks)
    padded = torch.zeros(len(masks), most, side, side, device=masks[0].device)
    for place, mask in zip(padded, masks, strict=True):
        if len(mask):
            place[: len(mask)].copy_(F.adaptive_avg_pool2d(mask.float(), (side, side)))
    return padded


def reference(masks: list[Tensor], side: int) -> Tensor:
    factor = masks[0].shape[-1] // side
    most = max(len(mask) for mask in masks)
    padded = torch.zeros(len(masks), most, side, side, dtype=torch.float64, device=masks[0].device)
    for place, mask in zip(padded, masks, strict=True):
        place[: len(mask)] = mask.double().unflatten(-1, (side, factor)).unflatten(-3, (side, factor)).mean((-3, -1))
    return padded
