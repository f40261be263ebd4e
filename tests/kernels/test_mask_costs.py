"""The kernels of ``query_mask_cost``: interpreted, with mistakes in them, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import query_mask_cost
from gresbox.testing import TOLERANCES, relative_error


def test_interpreted(run_interpreted):
    run_interpreted("mask_costs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(inside[None, :], 1.0 + small, 1.0)", "1.0 + small"),  # pixels beyond the image count
        ("tl.where(masks < 0, small, 1.0) / (1.0 + small)", "small / (1.0 + small)"),  # positive logits are priced as negative ones
        ("for part in range(ranges):", "for part in range(ranges - 1):"),  # the last range is left out
    ],
)
def test_mistakes_are_caught(is_caught, old, new):
    assert is_caught("mask_costs", old, new, "odd_sizes")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "side", "most"), [(1000, 120, 10), (37, 31, 3), (100, 30, 40)])
def test_on_a_gpu(dtype, queries, side, most):
    query = torch.randn(2, queries, 256, device="cuda").to(dtype) / 16
    pixels, targets = torch.randn(2, 256, side, side, device="cuda").to(dtype), torch.rand(2, most, side, side, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = query_mask_cost(query, pixels, targets, dtype=torch.float32, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = query_mask_cost(query.double(), pixels.double(), targets.double(), backend="eager")
    for out, ref in zip(got, want, strict=True):
        assert relative_error(out, ref) <= TOLERANCES[dtype]
