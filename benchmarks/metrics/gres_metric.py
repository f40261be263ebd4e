"""Updates of GRESMetric, all checks on, against the loop of the official evaluator and against sums over ready masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Form, Target
from benchmarks.peers.metrics import GRESLoop, overlap_of_ready_masks
from gresbox.metrics import GRESMetric

CASES = {"batch 1": {"B": 1, "S": 480}, "batch 8": {"B": 8, "S": 480}}
ON = {"cpu": ("batch 8", "batch 1"), "cuda": ()}
DIFFERENTIABLE = ()
NAMES = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Squares of a third of the side; a quarter of the expressions have no target, of which half are told so."""
    batch, size = case["B"], case["S"]
    corners = torch.randint(size // 2, (2, batch, 2), generator=generator).tolist()
    masks = torch.zeros(2, batch, size, size, dtype=torch.bool)
    for mine, places in zip(masks, corners, strict=True):
        for mask, (row, column) in zip(mine, places, strict=True):
            mask[row : row + size // 3, column : column + size // 3] = True
    masks[0, :, size // 4 : size // 2, size // 4 : size // 2] = True  # prediction and truth overlap
    masks[1, :, size // 4 : size // 2, size // 4 : size // 2] = True
    is_none = torch.arange(batch) % 4 == 3
    masks[1, is_none] = False
    channels = torch.randn(batch, 2, size, size, generator=generator, dtype=dtype)
    channels[:, 1] += torch.where(masks[0], 12.0, -12.0)
    flags = torch.randn(batch, 2, generator=generator, dtype=dtype)
    flags[:2] = torch.tensor([1.0, 0.0], dtype=dtype)
    return {
        "pred": masks[0],
        "target": masks[1],
        "says_none": flags.argmax(1) == 1,
        "is_none": is_none,
        "channels": channels,
        "flags": flags,
    }


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    metric = GRESMetric()

    def update(pred: Tensor, target: Tensor, says_none: Tensor, is_none: Tensor, **rest: Tensor) -> GRESMetric:
        metric.update(pred, target, says_none, is_none)
        return metric

    def from_channels(channels: Tensor, target: Tensor, says_none: Tensor, is_none: Tensor, **rest: Tensor) -> GRESMetric:
        metric.update(channels[:, 1] > channels[:, 0], target, says_none, is_none)
        return metric

    def read(metric: GRESMetric) -> Tensor:
        return as_vector({name: float(value) for name, value in metric.compute().items()})

    def arrays(**inputs: Tensor) -> dict[str, Any]:
        found = {name: value.numpy() for name, value in inputs.items()}
        return found | {"target": found["target"].astype(np.int8)[:, None]}

    ready = "the sums alone, of masks that are there"
    return {
        "gresbox": Form(update, read=read),
        "gresbox, from two channels": Form(from_channels, read=read),
        "ReLA's loop": Form(relas_loop, prepare=arrays, read=lambda loop: as_vector(loop.result())),
        "sums of ready masks": Form(sums_of_ready_masks, prepare=arrays, read=lambda made: torch.zeros(len(NAMES)), differs=ready),
    }


def relas_loop(channels: np.ndarray, flags: np.ndarray, target: np.ndarray, is_none: np.ndarray, **rest: np.ndarray) -> GRESLoop:
    loop = GRESLoop()
    for one in zip(channels, flags, target, is_none, strict=True):
        loop.add_channels(*one[:3], bool(one[3]))
    return loop


def sums_of_ready_masks(pred: np.ndarray, target: np.ndarray, **rest: np.ndarray) -> list[tuple[int, int]]:
    return overlap_of_ready_masks(pred, target[:, 0])


def as_vector(found: dict[str, float]) -> Tensor:
    return torch.tensor([found.get(name, 0.0) for name in NAMES], dtype=torch.float64).nan_to_num()


def reference(pred: Tensor, target: Tensor, says_none: Tensor, is_none: Tensor, **rest: Tensor) -> Tensor:
    """The definition, expression by expression, in Python numbers."""
    ious, shared, joined = [], 0.0, 0.0
    for mask, truth, says, none in zip(pred, target, says_none, is_none, strict=True):
        both, either = float((mask & truth).sum()), float((mask | truth).sum())
        if none and says:
            ious.append(1.0)
            continue
        if says:
            both = 0.0
        ious.append(0.0 if none or either == 0 else both / either)
        shared, joined = shared + (0.0 if none else both), joined + either
    some = [iou for iou, none in zip(ious, is_none, strict=True) if not none]
    return as_vector(
        {
            "gIoU": 100 * sum(ious) / len(ious),
            "cIoU": 100 * shared / joined,
            "N_acc": 100 * float(says_none[is_none].double().mean()),
            "T_acc": 100 * float((~says_none[~is_none]).double().mean()) if is_none.any() else 0.0,
            **{f"Pr@{level}": 100 * sum(iou >= level for iou in some) / len(some) for level in (0.7, 0.8, 0.9)},
        }
    )


TARGETS = [
    Target("gresbox", "ReLA's loop", "batch 1", "forward", at_least=6.7),
    Target("gresbox", "ReLA's loop", "batch 8", "forward", at_least=6.7),
    Target("gresbox", "sums of ready masks", "batch 8", "forward", at_least=1.67),
]
