"""Matching of patches and tokens after projection, by associativity, against projecting both sides, as AMLRIS does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from benchmarks.peers.alignment_masking import match_by_projecting_both
from gresbox.ops import match_patches, random_projections

SIZES = {"h": 14, "w": 14, "L": 20, "Cv": 1024, "Ct": 768, "D": 2048}
CASES = {"B=8": {"B": 8, **SIZES}, "B=1": {"B": 1, **SIZES}, "B=32": {"B": 32, **SIZES}}
ON = {"cpu": ("B=8", "B=1"), "cuda": ("B=32", "B=8", "B=1")}
DIFFERENTIABLE = ()
SCALE = 2 * 2048**0.5


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = partial(torch.randn, generator=generator, device=device)
    left, right = random_projections(case["Cv"], case["Ct"], case["D"])
    lengths = torch.randint(4, case["L"] + 1, (case["B"], 1), generator=generator, device=device)
    return {
        "visual": drawn(case["B"], case["Cv"], case["h"], case["w"]).to(dtype),
        "tokens": drawn(case["B"], case["L"], case["Ct"]).to(dtype),
        "valid": torch.arange(case["L"], device=device) < lengths,
        "left": left.to(device, dtype),
        "right": right.to(device, dtype),
    }


def match(visual: Tensor, tokens: Tensor, valid: Tensor, left: Tensor, right: Tensor, backend: str = "auto") -> Tensor:
    return match_patches(visual.flatten(2).mT, tokens, valid, left, right, scale=SCALE, backend=backend)


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    product: dict[str, Tensor] = {}

    def kept(visual: Tensor, tokens: Tensor, valid: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        product["matrix"] = right @ left.mT
        return {"visual": visual, "tokens": tokens, "valid": valid}

    def match_kept(visual: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        return match_patches(visual.flatten(2).mT, tokens, valid, None, product["matrix"], scale=SCALE)

    def projecting_both(visual: Tensor, tokens: Tensor, valid: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return match_by_projecting_both(visual, tokens, valid, left, right, SCALE).flatten(1)

    return {
        "gresbox": match,
        "gresbox, product of the matrices kept": Form(match_kept, prepare=kept),
        "gresbox, compiled": compiled(match),
        "eager": partial(match, backend="eager"),
        "eager, compiled": compiled(partial(match, backend="eager")),
        "AMLRIS": projecting_both,
    }


def reference(visual: Tensor, tokens: Tensor, valid: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return match(visual, tokens, valid, left, right, backend="eager")


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    """With the product of the matrices kept."""
    patches, words = case["B"] * case["h"] * case["w"], case["B"] * case["L"]
    flops = 2 * (words * case["Ct"] * case["Cv"] + patches * case["L"] * case["Cv"])
    traffic = patches * case["Cv"] + words * case["Ct"] + case["Cv"] * case["Ct"] + patches
    return Cost(flops=flops, bytes=traffic * itemsize)


TARGETS = [
    Target("gresbox", "eager", "B=8", "forward", at_least=4.0),
    Target("gresbox, product of the matrices kept", "eager", "B=8", "forward", at_least=4.0),
]
TOLERANCES = {"float32": 1e-4, "bfloat16": 6e-2}  # the softmax of logits of deviation 2 enlarges what the products round
NOTES = "The kept product is what `AlignmentAwareMasking` uses: its matrices are fixed."
