"""Attention to the pixels inside the queries' own masks, against SDPA with a ready mask, attention head by head, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Cost, Form, compiled
from gresbox.ops import masked_attention

SIZES = {"heads": 8, "N": 100, "D": 32}
CASES = {f"B={batch}, {side}x{side}": {"B": batch, "P": side * side, **SIZES} for batch in (1, 8, 32) for side in (15, 60)}
ON = {"cpu": ("B=1, 60x60", "B=8, 15x15"), "cuda": ("B=32, 60x60", "B=32, 15x15", "B=8, 60x60", "B=1, 60x60")}
DIFFERENTIABLE = ("query", "key", "value")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = partial(torch.randn, generator=generator, device=device)
    sizes = {"query": case["N"], "key": case["P"], "value": case["P"]}
    heads = {name: drawn(case["B"], case["heads"], count, case["D"]).to(dtype) for name, count in sizes.items()}
    return {**heads, "mask_logits": drawn(case["B"], case["N"], case["P"]) - 1.0}  # a sixth of the pixels


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def ready(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> dict[str, Tensor]:
        return {"query": query, "key": key, "value": value, "allowed": allowed_of(mask_logits)[:, None]}

    def sdpa(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    return {
        "gresbox": masked_attention,
        "eager": attend_by_heads,
        "eager, compiled": compiled(attend_by_heads),
        "SDPA, mask ready": Form(sdpa, prepare=ready),
        "FlexAttention": flex_form() if device == "cuda" else "on the CPU it has no backward pass",
    }


def allowed_of(mask_logits: Tensor) -> Tensor:
    inside = mask_logits >= 0
    return inside | ~inside.any(-1, keepdim=True)


def attend_by_heads(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> Tensor:
    """As Mask2Former's decoder does: the mask repeated for each head, the affinities stored."""
    blocked = ~allowed_of(mask_logits)[:, None].expand(-1, query.shape[1], -1, -1)
    affinity = (query / query.shape[-1] ** 0.5) @ key.mT
    return affinity.masked_fill(blocked, float("-inf")).softmax(-1) @ value


def flex_form() -> Form:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention)

    def call(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> Tensor:
        allowed = allowed_of(mask_logits)

        def inside(image: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return allowed[image, row, column]

        sizes = (query.shape[0], None, query.shape[2], key.shape[2])
        blocks = create_block_mask(inside, *sizes, device=query.device.type)
        return attend(query=query, key=key, value=value, block_mask=blocks)

    return Form(call)


def reference(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> Tensor:
    return attend_by_heads(query, key, value, mask_logits)


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    products = {"forward": 2, "backward": 5, "forward+backward": 7}[direction]
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    flops = 2 * products * case["B"] * case["heads"] * case["N"] * case["P"] * case["D"]
    traffic = 2 * case["B"] * case["heads"] * (case["N"] + case["P"]) * case["D"] * itemsize + case["B"] * case["N"] * case["P"]
    return Cost(flops=flops, bytes=passes * traffic)


NOTES = (
    "A kernel of our own would have to beat `scaled_dot_product_attention` by 1.3x to be worth it; there is none. On the "
    "CPU small maps, and with gradients larger ones, take a form that keeps the probabilities and nothing else of that size."
)
