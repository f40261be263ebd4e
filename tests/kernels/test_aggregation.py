"""The kernels of ``aggregate_queries``: interpreted, with mistakes in them, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.aggregation import keep_from_zero
from gresbox.ops import aggregate_queries
from gresbox.testing import assert_matches_reference

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_interpreted(run_interpreted):
    run_interpreted("aggregation")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(above, 1.0, factor[:, None])", "tl.where(above, 1.0, 1.0)"),  # the slope is forgotten in the pixels' gradient
        ("above | (row == N)[:, None]", "above"),  # the query that is positive everywhere is left out
        ("for part in range(ranges):", "for part in range(ranges - 1):"),  # the last partial sum is left out
    ],
)
def test_a_mistake_is_caught(is_caught, old, new):
    assert is_caught("aggregation", old, new, "odd_sizes")


def gpu_case(batch, count, dim, side, per_query):
    queries, pixels = torch.randn(batch, count, dim, device="cuda") / 16, torch.randn(batch, dim, side, side, device="cuda")
    keep_from_zero(queries, pixels)
    return [queries, pixels, torch.rand(batch, count, device="cuda"), torch.rand(count if per_query else (), device="cuda")]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "side", "per_query"), [(100, 120, False), (37, 31, True), (300, 24, False)])
def test_on_a_gpu(dtype, count, side, per_query):
    assert_matches_reference(
        lambda *inputs: aggregate_queries(*inputs, backend="triton"),
        lambda *inputs: aggregate_queries(*inputs, backend="eager"),
        gpu_case(2, count, 256, side, per_query),
        dtype=dtype,
    )


@on_gpu
def test_on_a_gpu_nothing_waits_and_bits_repeat():
    leaves = [leaf.requires_grad_() for leaf in gpu_case(4, 100, 256, 60, False)]
    weight = torch.randn(4, 60, 60, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (torch.autograd.grad(aggregate_queries(*leaves, backend="triton"), leaves, weight) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
