"""Generalised IoU of all pairs of boxes: the op against torchvision's and its own compiled form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, compiled, missing
from gresbox.ops import box_cxcywh_to_xyxy, generalized_box_iou

CASES = {
    "100 x 10": {"N": 100, "M": 10},
    "3200 x 10": {"N": 3200, "M": 10},
}
ON = {"cpu": ("100 x 10", "3200 x 10"), "cuda": ("100 x 10", "3200 x 10")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ("boxes1", "boxes2")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    def boxes(count: int) -> Tensor:
        sides = torch.rand(count, 4, generator=generator, device=device)
        return box_cxcywh_to_xyxy(0.1 + 0.4 * sides).to(dtype)

    return {"boxes1": boxes(case["N"]), "boxes2": boxes(case["M"])}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def torchvision(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        from torchvision.ops import generalized_box_iou as peer

        return peer(boxes1, boxes2)

    return {
        "gresbox": generalized_box_iou,
        "gresbox, compiled": compiled(generalized_box_iou),
        "torchvision": missing("torchvision") or torchvision,
    }


def reference(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return generalized_box_iou(boxes1, boxes2)


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    pairs, ends = case["N"] * case["M"], 4 * (case["N"] + case["M"])
    return Cost(flops=30 * passes * pairs, bytes=passes * (pairs + ends) * itemsize)


NOTES = "Not compiled, ours is slower than torchvision's: it keeps boxes without area finite, in values and gradients."
