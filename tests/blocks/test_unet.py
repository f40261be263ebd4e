from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from gresbox.blocks import UNetDecoder
from gresbox.testing import assert_matches_reference


def upsampled(x, height, width):
    """Bilinear with aligned corners: the first and last pixels stay, the others lie evenly between."""

    def along(x, size):
        position = torch.linspace(0, x.shape[-1] - 1, size, dtype=x.dtype)
        low = position.floor().long().clamp(max=x.shape[-1] - 1)
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        share = position - low
        return x[..., low] * (1 - share) + x[..., high] * share

    return along(along(x, width).mT, height).mT


def by_hand(block, levels):
    *finer, x = levels
    for fuse, level in zip(block.fuse, reversed(finer), strict=True):
        x = torch.cat([upsampled(x, *level.shape[-2:]), level], 1)
        for conv, norm in ((fuse[0], fuse[1]), (fuse[3], fuse[4])):
            x = nn.functional.conv2d(x, conv.weight.double(), padding=1)
            mean, variance, weight, bias = (
                p.double().view(1, -1, 1, 1) for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            x = ((x - mean) / (variance + norm.eps).sqrt() * weight + bias).clamp(min=0)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equations_by_hand(dtype):
    block = UNetDecoder(6, num_levels=3).eval()
    for index, (name, value) in enumerate(block.state_dict().items()):
        if value.is_floating_point():
            torch.manual_seed(index)
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.3)
    reference = UNetDecoder(6, num_levels=3).eval()
    reference.load_state_dict(block.state_dict())
    block = block.to(dtype)
    levels = [torch.randn(2, 6, 9, 8), torch.randn(2, 6, 5, 4), torch.randn(2, 6, 2, 2)]
    assert_matches_reference(
        lambda *x: block(x),
        lambda *x: by_hand(reference, x),
        levels,
        dtype=dtype,
    )


def test_result_is_not_negative_and_every_parameter_gets_a_gradient():
    block = UNetDecoder(6)
    out = block([torch.randn(2, 6, size, size) for size in (16, 8, 4, 2)])
    assert out.shape == (2, 6, 16, 16)
    assert out.min() == 0
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in block.parameters())


def test_one_level_passes_through_and_the_norm_can_be_another():
    level = torch.randn(1, 6, 4, 4)
    assert UNetDecoder(6, num_levels=1)([level]) is level
    block = UNetDecoder(6, num_levels=2, norm=partial(nn.GroupNorm, 2))
    levels = [torch.randn(3, 6, 4, 4), torch.randn(3, 6, 2, 2)]
    torch.testing.assert_close(block([level[:1] for level in levels]), block(levels)[:1])  # no batch statistics


def test_errors():
    with pytest.raises(ValueError, match="UNetDecoder: `num_levels` must be at least 1, got 0"):
        UNetDecoder(6, num_levels=0)
    with pytest.raises(ValueError, match="`levels` must be 4 maps, finest first, got 3"):
        UNetDecoder(6)([torch.zeros(1, 6, 4, 4)] * 3)
    with pytest.raises(ValueError, match=r"`levels\[1\]` must be \(B, 6, \*, \*\), got \(1, 5, 2, 2\)"):
        UNetDecoder(6, num_levels=2)([torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 2, 2)])
