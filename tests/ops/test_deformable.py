"""Deformable attention against the original implementation's numbers and a sum written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import deformable_attention


@pytest.mark.parametrize("case", ["inside", "outside", "single_1x1", "non_pow2", "edges"])
def test_golden(golden, case):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("m2f_msda").items() if key.startswith(f"{case}/")}
    leaves = [data[name].requires_grad_() for name in ("value", "sampling_locations", "attention_weights")]
    shapes = [tuple(shape) for shape in data["spatial_shapes"].tolist()]
    out = deformable_attention(leaves[0], shapes, *leaves[1:])
    torch.testing.assert_close(out, data["output"], rtol=0, atol=1e-14)
    grads = torch.autograd.grad(out, leaves, data["grad_output"])
    for name, grad in zip(("value", "sampling_locations", "attention_weights"), grads, strict=True):
        torch.testing.assert_close(grad, data[f"grad_{name}"], rtol=0, atol=1e-13)


def _by_hand(value, shapes, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    start = 0
    for level, (height, width) in enumerate(shapes):
        for b, q, h, k in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads, points))).tolist():
            x, y = (locations[b, q, h, level, k] * torch.tensor([width, height]) - 0.5).tolist()
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, level, k]
                        out[b, q, h] += share * value[b, start + row * width + column, h]
        start += height * width
    return out.flatten(2)


@given(st.integers(1, 2), st.integers(1, 2), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2))
def test_equals_the_sum_by_hand(batch, heads, shapes):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, 3, dtype=torch.float64)
    locations = torch.rand(batch, 2, heads, len(shapes), 2, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(batch, 2, heads, len(shapes), 2, dtype=torch.float64)
    out = deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(out, _by_hand(value, shapes, locations, weights))


def test_queries_and_images_are_independent():
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = torch.randn(3, 16, 2, 4), torch.rand(3, 5, 2, 2, 3, 2), torch.rand(3, 5, 2, 2, 3)
    out = deformable_attention(value, shapes, locations, weights)
    order = torch.randperm(5)
    torch.testing.assert_close(deformable_attention(value, shapes, locations[:, order], weights[:, order]), out[:, order])
    torch.testing.assert_close(deformable_attention(value[1:2], shapes, locations[1:2], weights[1:2]), out[1:2])
    assert deformable_attention(value, shapes, locations[:, :0], weights[:, :0]).shape == (3, 0, 8)
    assert deformable_attention(value[:0], shapes, locations[:0], weights[:0]).shape == (0, 5, 8)


def test_errors():
    value, locations, weights = torch.zeros(1, 16, 2, 4), torch.zeros(1, 5, 2, 2, 3, 2), torch.zeros(1, 5, 2, 2, 3)
    with pytest.raises(ValueError, match=r"`spatial_shapes` must be 2 levels with 16 pixels in all, got \[\(3, 4\), \(2, 3\)\]\.$"):
        deformable_attention(value, [(3, 4), (2, 3)], locations, weights)
    with pytest.raises(ValueError, match=r"`weights` must be \(B, Q, heads, levels, points\) with points=3, got"):
        deformable_attention(value, [(3, 4), (2, 2)], locations, weights[..., :2])
