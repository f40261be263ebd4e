"""RESMetric against torchmetrics' Jaccard index of the same masks, which is oIoU alone; ours counts mIoU and Pr@X too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Form, attempt, missing
from gresbox.metrics import RESMetric

CASES = {"batch 8": {"B": 8, "S": 480}}
ON = {"cpu": ("batch 8",), "cuda": ()}
DIFFERENTIABLE = ()


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    pred = torch.zeros(case["B"], case["S"], case["S"], dtype=torch.bool)
    corners = torch.randint(case["S"] // 2, (case["B"], 2), generator=generator).tolist()
    for mask, (row, column) in zip(pred, corners, strict=True):
        mask[row : row + case["S"] // 2, column : column + case["S"] // 2] = True
    return {"pred": pred, "target": pred.roll((20, 30), (1, 2))}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    metric = RESMetric()

    def update(pred: Tensor, target: Tensor) -> RESMetric:
        metric.update(pred, target)
        return metric

    return {
        "gresbox": Form(update, read=lambda metric: metric.compute()["oIoU"].double().reshape(1) / 100),
        "torchmetrics": missing("torchmetrics") or attempt(torchmetrics_form),
    }


def torchmetrics_form() -> Form:
    from torchmetrics.classification import BinaryJaccardIndex

    metric = BinaryJaccardIndex()

    def update(pred: Tensor, target: Tensor) -> BinaryJaccardIndex:
        metric.update(pred, target)
        return metric

    return Form(update, read=lambda metric: metric.compute().reshape(1))


def reference(pred: Tensor, target: Tensor) -> Tensor:
    return ((pred & target).sum().double() / (pred | target).sum()).reshape(1)
