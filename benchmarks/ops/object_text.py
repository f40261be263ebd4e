"""Attention between objects and words in both directions, against its two softmaxes written out and PyTorch's attention twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Cost, Form, Target, compiled
from gresbox.ops import cross_attend_both

PAPER = {"heads": 8, "N": 100, "L": 20, "D": 32}
CASES = {
    "B=8": {"B": 8, **PAPER},
    "B=1": {"B": 1, **PAPER},
    "B=32": {"B": 32, **PAPER},
    "2x": {"B": 32, **PAPER, "N": 200, "L": 40},
}
ON = {"cpu": ("B=8", "B=1", "B=32"), "cuda": ("B=32", "B=8", "B=1", "2x")}
DIFFERENTIABLE = ("object_query", "token_key", "token_value", "token_query", "object_key", "object_value")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """As projections leave them: ``(B, rows, heads, D)`` in memory."""
    rows = {name: case["N" if name.startswith("object") else "L"] for name in DIFFERENTIABLE}
    drawn = {
        name: torch.randn(case["B"], count, case["heads"], case["D"], generator=generator, device=device).to(dtype).transpose(1, 2)
        for name, count in rows.items()
    }
    lengths = torch.randint(4, case["L"] + 1, (case["B"], 1), generator=generator, device=device)
    return {**drawn, "valid": torch.arange(case["L"], device=device) < lengths}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    eager = partial(cross_attend_both, backend="eager")

    def ready(valid: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        return {**inputs, "allowed": valid[:, None, None]}

    def sdpa(
        object_query: Tensor,
        token_key: Tensor,
        token_value: Tensor,
        token_query: Tensor,
        object_key: Tensor,
        object_value: Tensor,
        allowed: Tensor,
    ) -> tuple[Tensor, Tensor]:
        objects = F.scaled_dot_product_attention(object_query, token_key, token_value, attn_mask=allowed)
        return objects, F.scaled_dot_product_attention(token_query, object_key, object_value)

    return {
        "gresbox": cross_attend_both,
        "gresbox, compiled": compiled(cross_attend_both),
        "eager": eager,
        "eager, compiled": compiled(eager),
        "SDPA twice, mask ready": Form(sdpa, prepare=ready),
    }


def reference(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    return cross_attend_both(**inputs, backend="eager")


def same_form(case: str, device: str, direction: str) -> bool:
    return device == "cpu" and case != "B=1"


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    products = {"forward": 4, "backward": 10, "forward+backward": 14}[direction]
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    flops = 2 * products * case["B"] * case["heads"] * case["N"] * case["L"] * case["D"]
    traffic = 4 * case["B"] * case["heads"] * (case["N"] + case["L"]) * case["D"] * itemsize
    return Cost(flops=flops, bytes=passes * traffic)


TARGETS = [
    Target("gresbox", "eager", "B=8", "forward", at_least=1.0),
    Target("gresbox", "eager", "B=8", "forward+backward", at_least=1.0),
    Target("gresbox", "eager", "B=32", "forward", at_least=10.0, device="cuda"),
    Target("gresbox", "eager", "B=32", "forward+backward", at_least=10.0, device="cuda"),
]
