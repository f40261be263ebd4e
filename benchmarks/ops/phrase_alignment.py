"""Phrase-object alignment of all decoder steps by inner products alone, against equations 1 to 3 as printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cost, Form, Target, compiled
from gresbox.ops import align_phrases

PAPER = {"S": 9, "N": 100, "L": 20, "C": 256}
CASES = {
    "B=8": {"B": 8, **PAPER},
    "B=1": {"B": 1, **PAPER},
    "B=1, one step": {"B": 1, **PAPER, "S": 1},
    "B=32": {"B": 32, **PAPER},
    "2x": {"B": 32, **PAPER, "N": 200, "L": 40},
}
ON = {"cpu": ("B=8", "B=1", "B=1, one step"), "cuda": ("B=32", "B=8", "B=1", "2x")}
DIFFERENTIABLE = ("queries", "tokens")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Steps as images; texts of at least four tokens."""
    drawn, batch = partial(torch.randn, generator=generator, device=device), case["B"] * case["S"]
    lengths = torch.randint(4, case["L"] + 1, (batch, 1), generator=generator, device=device)
    return {
        "queries": drawn(batch, case["N"], case["C"]).to(dtype),
        "tokens": drawn(batch, case["L"], case["C"]).to(dtype),
        "valid": torch.arange(case["L"], device=device) < lengths,
    }


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    eager = partial(align_phrases, backend="eager")
    return {
        "gresbox": align_phrases,
        "gresbox, compiled": compiled(align_phrases),
        "eager": eager,
        "eager, compiled": compiled(eager),
    }


def reference(queries: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return align_phrases(queries, tokens, valid, backend="eager")


def same_form(case: str, device: str, direction: str) -> bool:
    return device == "cpu" and case == "B=1, one step" and direction == "forward"


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    """In the Gram form."""
    batch, count, length, dim = case["B"] * case["S"], case["N"], case["L"], case["C"]
    features, pairs = batch * (count + length) * dim * itemsize, batch * count * length * itemsize
    forward = Cost(flops=2 * batch * length * (count * (dim + length) + length * dim), bytes=features + pairs)
    if direction == "forward":
        return forward
    backward = Cost(flops=2 * forward.flops, bytes=2 * features + pairs)
    if direction == "backward":
        return backward
    return Cost(flops=forward.flops + backward.flops, bytes=forward.bytes + backward.bytes)


TARGETS = [
    Target("gresbox", "eager", "B=8", "forward", at_least=2.0),
    Target("gresbox", "eager", "B=8", "forward+backward", at_least=2.0),
    Target("gresbox", "eager", "B=32", "forward", at_least=5.0, device="cuda"),
    Target("gresbox", "eager", "B=32", "forward+backward", at_least=5.0, device="cuda"),
]

NOTES = (
    "Two designs were tried on the CPU: by inner products with queries first, and with words first, which is the faster "
    "product; half of the forward pass is that one product. For few queries without gradients the printed equations run, "
    "which are as fast."
)
