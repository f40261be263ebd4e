"""Mask losses of the matched queries of all decoder steps, from embeddings and pixels, against masks that are built first.

Results are the two losses of each step, summed over all matches. Images have different numbers of targets, which are padded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from benchmarks.peers.mask2former import mask_losses_of_layer
from gresbox.ops import matched_mask_losses

PAPER = {"S": 10, "N": 100, "C": 256, "side": 120}
CASES = {
    "B=4": {"B": 4, **PAPER, "targets": "1 3 5 10"},
    "B=1": {"B": 1, **PAPER, "targets": "3"},
    "B=2, no padding": {"B": 2, **PAPER, "targets": "10 10"},
    "tiny": {"B": 8, "S": 4, "N": 16, "C": 64, "side": 16, "targets": "0 1 2 3 1 2 3 4"},
    "B=32": {"B": 32, **PAPER, "targets": "0 to 10"},
    "B=8": {"B": 8, **PAPER, "targets": "0 to 10"},
    "B=32, 1 step": {"B": 32, **PAPER, "S": 1, "targets": "0 to 10"},
    "2x": {"B": 8, **PAPER, "N": 200, "side": 240, "targets": "0 to 20"},
}
ON = {
    "cpu": ("B=4", "B=1", "B=2, no padding", "tiny"),
    "cuda": ("B=32", "B=8", "B=32, 1 step", "B=1", "2x"),
}
DIFFERENTIABLE = ("queries", "pixels")


def counts_of(case: dict[str, Any]) -> list[int]:
    """Targets of each image."""
    words = case["targets"].split()
    if "to" not in words:
        return [int(word) for word in words]
    low, high = int(words[0]), int(words[2])
    return [high, *torch.randint(low, high + 1, (case["B"] - 1,), generator=torch.Generator().manual_seed(0)).tolist()]


def make_inputs(case: dict[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Logits of a standard deviation of 3; targets are fractions of pixels, as masks averaged over areas are."""
    drawn = partial(torch.randn, generator=generator, device=device)
    steps, batch, side, counts = case["S"], case["B"], case["side"], counts_of(case)
    covered = torch.rand(batch, max(counts), side, side, generator=generator, device=device)
    chosen = torch.rand(steps, batch, case["N"], generator=generator, device=device).argsort(-1)[..., : max(counts)]
    exists = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
    return {
        "queries": (drawn(steps, batch, case["N"], case["C"]) * 3 / case["C"] ** 0.5).to(dtype),
        "pixels": drawn(batch, case["C"], side, side).to(dtype),
        "targets": (covered * 16).round() / 16,
        "matches": torch.where(exists, chosen, -1),
    }


def by_steps(queries: Tensor, pixels: Tensor, targets: Tensor, matches: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    bce, dice = matched_mask_losses(queries, pixels, targets, matches, dtype=torch.float32, backend=backend)
    return bce.sum((1, 2)), dice.sum((1, 2))


def with_pairs(matches: Tensor, **inputs: Tensor) -> dict[str, Any]:
    """Matches as Mask2Former's matcher hands them on."""
    pairs = [[(rows[rows >= 0], torch.nonzero(rows >= 0)[:, 0]) for rows in step.cpu()] for step in matches]
    return {**inputs, "pairs": pairs}


def layer_by_layer(queries: Tensor, pixels: Tensor, targets: Tensor, pairs: list[Any]) -> tuple[Tensor, Tensor]:
    """As Mask2Former's criterion does: all masks of a layer are built, and the matched ones taken out by index."""
    bce, dice = [], []
    for embeddings, matched in zip(queries, pairs, strict=True):
        masks = torch.einsum("bnc,bchw->bnhw", embeddings, pixels).float()
        losses = mask_losses_of_layer(masks, list(targets), matched, 1.0, None)
        bce.append(losses[0])
        dice.append(losses[1])
    return torch.stack(bce), torch.stack(dice)


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {
        "gresbox": partial(by_steps, backend="auto"),
        "gresbox, compiled": compiled(partial(by_steps, backend="auto")),
        "eager": partial(by_steps, backend="eager"),
        "eager, compiled": compiled(partial(by_steps, backend="eager")),
        "Mask2Former's loop": Form(layer_by_layer, prepare=with_pairs),
    }


def reference(queries: Tensor, pixels: Tensor, targets: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """Step by step: all masks in float64 would fill a GPU."""
    bce, dice = zip(
        *(
            matched_mask_losses(step[None], pixels, targets, chosen[None], backend="eager")
            for step, chosen in zip(queries, matches, strict=True)
        ),
        strict=True,
    )
    return torch.cat(bce).sum((1, 2)), torch.cat(dice).sum((1, 2))


def same_form(case: str, device: str, direction: str) -> bool:
    return device == "cpu" and case in ("B=1", "tiny")


def cost(case: dict[str, Any], itemsize: int, direction: str) -> Cost:
    counts, area = counts_of(case), case["side"] ** 2
    product = 2 * case["S"] * sum(counts) * area * case["C"]
    features = case["B"] * case["C"] * area * itemsize
    truth = 4 * sum(counts) * area
    forward, backward = Cost(product, features + truth), Cost(3 * product, 2 * features + truth)
    both = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "forward+backward": both}[direction]


TARGETS = [
    *(Target("gresbox", "eager", case, "forward+backward", at_least=1.0) for case in ON["cpu"]),
    Target("gresbox", "Mask2Former's loop", "B=32", "forward+backward", at_least=10.0, syncs_at_most=0, device="cuda"),
    Target("gresbox", "eager, compiled", "B=32", "forward+backward", at_least=3.0, memory_at_most=0.1, device="cuda"),
]

NOTES = (
    "On the CPU larger cases scatter from run to run, as fresh memory costs each form little or much: with gradients "
    '"B=2, no padding" was 0.86x, 0.87x, 0.99x, 1.00x and 1.12x of eager in five runs.'
)
