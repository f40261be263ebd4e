"""Assignment of targets to queries for a whole batch, against SciPy image by image and torch-linear-assignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Form, Target, missing
from benchmarks.peers.mask2former import assign_exactly, solve
from gresbox.ops import assign

PAPER = {"N": 100, "M": 10}
CASES = {
    "320 of 100 x 10": {"B": 320, **PAPER, "alike": 0.0},
    "32 of 100 x 10": {"B": 32, **PAPER, "alike": 0.0},
    "320 of 100 x 10, alike": {"B": 320, **PAPER, "alike": 0.95},
    "32 of 200 x 20": {"B": 32, "N": 200, "M": 20, "alike": 0.0},
    "32 of 300 x 40": {"B": 32, "N": 300, "M": 40, "alike": 0.0},
}
ON = {"cpu": ("320 of 100 x 10", "32 of 100 x 10", "320 of 100 x 10, alike"), "cuda": tuple(CASES)}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ()


def make_inputs(case: dict[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Random costs; where they are alike all targets want the same queries, as early in training, and paths are long."""
    shape = (case["B"], case["N"], case["M"])
    own = torch.rand(shape, generator=generator, device=device)
    common = torch.rand((case["B"], case["N"], 1), generator=generator, device=device)
    return {"cost": ((1 - case["alike"]) * own + case["alike"] * common).to(dtype)}


def one_by_one(cost: Tensor) -> Tensor:
    """As Mask2Former's matcher does: every image waits for the device."""
    rows = torch.empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)
    for place, each in zip(rows, cost, strict=True):
        row, column = solve(each.cpu())
        place[column] = row
    return rows.to(cost.device)


def without_validation(cost: Tensor) -> Tensor:
    from torch_linear_assignment._triton import batch_linear_assignment

    return batch_linear_assignment(cost.mT, validation="off")


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    peer = missing("torch-linear-assignment", "0.1.0")
    off: Callable[..., Any] | str = peer or without_validation
    return {
        "gresbox": assign,
        "gresbox, by torch-linear-assignment": peer or (lambda cost: assign(cost, backend="torch_linear_assignment")),
        "SciPy, image by image": one_by_one,
        "torch-linear-assignment": peer or torch_linear_assignment,
        "torch-linear-assignment, validation off": off if device == "cuda" else "its kernel needs a GPU",
    }


def torch_linear_assignment(cost: Tensor) -> Tensor:
    from torch_linear_assignment import batch_linear_assignment

    return batch_linear_assignment(cost.mT)


def reference(cost: Tensor) -> Tensor:
    found = np.stack([assign_exactly(each) for each in cost.cpu().numpy()])
    return torch.from_numpy(found).to(cost.device)


PEER = "torch-linear-assignment, validation off"
TARGETS = [
    Target("gresbox", "SciPy, image by image", "320 of 100 x 10", "forward", at_least=1.3),
    Target("gresbox", None, "320 of 100 x 10", "forward", microseconds_at_most=60, syncs_at_most=0, device="cuda", clock="graph"),
    Target("gresbox", PEER, "320 of 100 x 10", "forward", at_least=1.0, device="cuda"),
]
