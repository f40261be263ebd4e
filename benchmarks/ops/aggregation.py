"""Masks merged by relevance straight from embeddings and pixels, against equations 4 and 8 with all masks built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from gresbox.ops import aggregate_queries

PAPER = {"N": 100, "C": 256, "side": 120}
CASES = {
    "B=1": {"B": 1, **PAPER},
    "B=8": {"B": 8, **PAPER},
    "B=32": {"B": 32, **PAPER},
    "2x": {"B": 8, **PAPER, "N": 200, "side": 240},
    "4x": {"B": 4, **PAPER, "N": 300, "side": 240},
}
ON = {"cpu": ("B=1", "B=8"), "cuda": ("B=32", "B=8", "B=1", "2x", "4x")}
DIFFERENTIABLE = ("queries", "pixels", "scores", "slope")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Logits of a standard deviation of 3; scores and slope stay in float32, as parameters do."""
    drawn = partial(torch.randn, generator=generator, device=device)
    queries = (drawn(case["B"], case["N"], case["C"]) * 3 / case["C"] ** 0.5).to(dtype)
    pixels = drawn(case["B"], case["C"], case["side"], case["side"]).to(dtype)
    keep_from_zero(queries, pixels)
    return {
        "queries": queries,
        "pixels": pixels,
        "scores": drawn(case["B"], case["N"]).sigmoid(),
        "slope": torch.full((), 0.25, device=device),
    }


def keep_from_zero(queries: Tensor, pixels: Tensor) -> None:
    """Move pixels until no mask is so near PReLU's kink that rounding says on which side it is: its gradient is another there."""
    for query, feature in zip(queries, pixels.flatten(2), strict=True):
        for _ in range(8):
            near = (query.double() @ feature.double()).abs() < 1e-4
            row, column = near.nonzero(as_tuple=True)
            feature[:, column] += 0.1 * query[row].mT


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    eager = partial(aggregate_queries, backend="eager")
    return {
        "gresbox": aggregate_queries,
        "gresbox, compiled": compiled(aggregate_queries),
        "eager": eager,
        "eager, compiled": compiled(eager),
    }


def reference(queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor) -> Tensor:
    """Image by image: all masks of a batch in float64 would fill a GPU."""
    each = zip(queries, pixels, scores, strict=True)
    return torch.cat([aggregate_queries(q[None], v[None], p[None], slope, backend="eager") for q, v, p in each])


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    """Backward, two products and one bit per mask and pixel."""
    area = case["B"] * case["side"] ** 2
    product, features = 2 * case["N"] * case["C"] * area, case["C"] * area * itemsize
    forward = Cost(flops=product, bytes=features + 4 * area)
    if direction == "forward":
        return forward
    bits = case["N"] * area / 8
    backward = Cost(flops=2 * product, bytes=2 * features + 4 * area + 2 * bits)
    if direction == "backward":
        return backward
    return Cost(flops=forward.flops + backward.flops, bytes=forward.bytes + backward.bytes + bits)


TARGETS = [
    Target("gresbox", "eager", "B=1", "forward", at_least=1.2),
    Target("gresbox", "eager", "B=8", "forward", at_least=2.0, memory_at_most=0.3),
    Target("gresbox", "eager", "B=1", "forward+backward", at_least=1.0),
    Target("gresbox", "eager", "B=8", "forward+backward", at_least=1.5, memory_at_most=0.3),
    Target("gresbox", "eager", "B=32", "forward", at_least=2.5, device="cuda"),
    Target("gresbox", "eager", "B=32", "forward+backward", at_least=2.2, memory_at_most=0.1, device="cuda"),
    Target("gresbox", "eager, compiled", "B=32", "forward", at_least=1.3, device="cuda"),
    Target("gresbox", "eager, compiled", "B=32", "forward+backward", at_least=1.3, device="cuda"),
]

NOTES = (
    "On the CPU the product of queries and pixels is nearly the whole forward pass of ours, and most of eager's, whose time "
    "scatters as fresh memory costs it little or much: in a shorter run an hour before this one B=8 was 1.13x forward and 1.20x "
    "with gradients. So twice eager's speed is out of reach there. The backward pass is two more such products. Tried: whole "
    "images, pieces of 2^16 to 2^21 values, several images at once, and runs of one image's pixels, one core for each, which are "
    "kept."
)
