"""Mask costs of all queries with all targets, over decoder steps, from embeddings and pixels, against the masks built first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from benchmarks.peers.mask2former import cross_entropy_of_pairs, dice_of_pairs
from gresbox.ops import query_mask_cost

PAPER = {"N": 100, "C": 256, "M": 10, "side": 120}
CASES = {
    "B=1, 1 step": {"B": 1, "S": 1, **PAPER},
    "B=4, 1 step": {"B": 4, "S": 1, **PAPER},
    "B=1, 10 steps": {"B": 1, "S": 10, **PAPER},
    "B=32, 10 steps": {"B": 32, "S": 10, **PAPER},
    "B=8, 10 steps": {"B": 8, "S": 10, **PAPER},
    "B=32, 1 step": {"B": 32, "S": 1, **PAPER},
    "2x": {"B": 8, "S": 10, **PAPER, "N": 200, "M": 20, "side": 240},
    "4x": {"B": 4, "S": 10, **PAPER, "N": 300, "M": 40, "side": 240},
}
ON = {
    "cpu": ("B=1, 1 step", "B=4, 1 step", "B=1, 10 steps"),
    "cuda": ("B=32, 10 steps", "B=8, 10 steps", "B=32, 1 step", "B=1, 1 step", "2x", "4x"),
}
DIFFERENTIABLE = ()  # matching takes no gradient


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Logits of a standard deviation of 3; targets are fractions of pixels, as masks averaged over areas are."""
    drawn = partial(torch.randn, generator=generator, device=device)
    side = case["side"]
    covered = torch.rand(case["B"], case["M"], side, side, generator=generator, device=device)
    return {
        "queries": (drawn(case["B"], case["S"] * case["N"], case["C"]) * 3 / case["C"] ** 0.5).to(dtype),
        "pixels": drawn(case["B"], case["C"], side, side).to(dtype),
        "targets": (covered * 16).round() / 16,
        "steps": case["S"],
    }


def price(queries: Tensor, pixels: Tensor, targets: Tensor, steps: int, *, backend: str) -> tuple[Tensor, Tensor]:
    return query_mask_cost(queries, pixels, targets, dtype=torch.float32, backend=backend)


def image_by_image(queries: Tensor, pixels: Tensor, targets: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """As Mask2Former's matcher prices them: masks of a step are built for the batch, then priced image by image."""
    bce, dice = [], []
    truth = targets.flatten(2)
    for each in queries.chunk(steps, 1):
        masks = torch.einsum("bnc,bchw->bnhw", each, pixels).float().flatten(2)
        bce.append(torch.stack([cross_entropy_of_pairs(m, t) for m, t in zip(masks, truth, strict=True)]))
        dice.append(torch.stack([dice_of_pairs(m, t) for m, t in zip(masks, truth, strict=True)]))
    return torch.cat(bce, 1), torch.cat(dice, 1)


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {
        "gresbox": partial(price, backend="auto"),
        "eager": partial(price, backend="eager"),
        "eager, compiled": compiled(partial(price, backend="eager")),
        "Mask2Former's loop": image_by_image,
    }


def reference(queries: Tensor, pixels: Tensor, targets: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Image by image, and step by step: all masks of a batch in float64 would fill a GPU."""
    truth, bce, dice = targets.flatten(2), [], []
    for image in range(queries.shape[0]):
        for each in queries[image].chunk(steps):
            masks = each @ pixels[image].flatten(1)
            bce.append(cross_entropy_of_pairs(masks, truth[image]))
            dice.append(dice_of_pairs(masks, truth[image]))
    shape = (queries.shape[0], queries.shape[1], -1)
    return torch.cat(bce).view(shape), torch.cat(dice).view(shape)


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    batch, count, area = case["B"], case["S"] * case["N"], case["side"] ** 2
    read = batch * (count * case["C"] + case["C"] * area) * itemsize + 4 * batch * case["M"] * area
    flops = 2 * batch * count * area * (case["C"] + 2 * case["M"])
    return Cost(flops=flops, bytes=read + 8 * batch * count * case["M"])


TARGETS = [
    Target("gresbox", "Mask2Former's loop", "B=1, 1 step", "forward", at_least=1.7),
    Target("gresbox", "eager, compiled", "B=32, 10 steps", "forward", at_least=4.0, memory_at_most=0.02, device="cuda"),
    Target("gresbox", "Mask2Former's loop", "B=32, 10 steps", "forward", at_least=50.0, syncs_at_most=0, device="cuda"),
]

NOTES = (
    "With one step the product of queries and pixels, which all forms share, is half of the time; steps that share their "
    "pixels gain more. Tried on the CPU: logits and probabilities in passes of their own; chunks of all images; and runs "
    "of one image's pixels, one core for each, which is kept."
)
