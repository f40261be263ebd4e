from __future__ import annotations

import pytest
import torch
from torch import nn

from gresbox.blocks import SimpleFeaturePyramid
from gresbox.testing import assert_matches_reference


def norm(x, layer):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    weight, bias = (p.double().view(1, -1, 1, 1) for p in (layer.weight, layer.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def by_hand(block, x):
    """Transposed convolutions of stride 2 and size 2 as products per pixel, pooling as a maximum of four."""

    def double_size(x, conv):
        out = torch.einsum("bchw,cdyx->bdhywx", x, conv.weight.double())
        return out.flatten(4, 5).flatten(2, 3) + conv.bias.double().view(1, -1, 1, 1)

    four, two, _, _ = block.resize
    maps = [
        double_size(nn.functional.gelu(norm(double_size(x, four[0]), four[1])), four[3]),
        double_size(x, two),
        x,
        torch.stack([x[..., i : x.shape[2] - 1 + i : 2, j : x.shape[3] - 1 + j : 2] for i in (0, 1) for j in (0, 1)]).amax(0),
    ]
    out = []
    for x, lateral, smooth in zip(maps, block.lateral, block.smooth, strict=True):
        x = norm(torch.einsum("bchw,dc->bdhw", x, lateral[0].weight[..., 0, 0].double()), lateral[1])
        out.append(norm(nn.functional.conv2d(x, smooth[0].weight.double(), padding=1), smooth[1]))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equations_by_hand(dtype):
    block = SimpleFeaturePyramid(8, 6)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = SimpleFeaturePyramid(8, 6)
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 4, 6)
    assert_matches_reference(
        block.to(dtype),
        lambda x: by_hand(reference, x),
        [x],
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("scales", "sizes"), [((4, 2, 1, 0.5), [(20, 12), (10, 6), (5, 3), (2, 1)]), ((1,), [(5, 3)]), ((2, 0.5), [(10, 6), (2, 1)])]
)
def test_scales_and_odd_sizes(scales, sizes):
    block = SimpleFeaturePyramid(8, 6, scales=scales)
    levels = block(torch.randn(2, 8, 5, 3))
    assert [tuple(level.shape) for level in levels] == [(2, 6, *size) for size in sizes]
    sum(level.square().sum() for level in levels).backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_images_do_not_see_each_other():
    block, x = SimpleFeaturePyramid(8, 6).double(), torch.randn(3, 8, 4, 4, dtype=torch.float64)
    for level, alone in zip(block(x), block(x[1:2]), strict=True):
        torch.testing.assert_close(level[1:2], alone)


def test_errors():
    with pytest.raises(ValueError, match=r"SimpleFeaturePyramid: `scales` must be one of 4, 2, 1, 0\.5, got 3"):
        SimpleFeaturePyramid(8, 6, scales=(3,))
    with pytest.raises(ValueError, match=r"`scales` must fall, finest first, got \(1, 2\)"):
        SimpleFeaturePyramid(8, 6, scales=(1, 2))
    with pytest.raises(ValueError, match=r"`scales` must fall, finest first, got \(\)"):
        SimpleFeaturePyramid(8, 6, scales=())
    with pytest.raises(ValueError, match="`in_dim` must be a multiple of 4 for its finest scale, got 6"):
        SimpleFeaturePyramid(6, 6)
    block = SimpleFeaturePyramid(8, 6)
    with pytest.raises(ValueError, match=r"`features` must have at least 2 rows and columns for scale 0\.5, got \(1, 4\)"):
        block(torch.zeros(1, 8, 1, 4))
    with pytest.raises(ValueError, match=r"`features` must be \(B, 8, h, w\), got \(1, 6, 4, 4\)"):
        block(torch.zeros(1, 6, 4, 4))
