"""A stem of convolutions: patches for an encoder that starts from random weights."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class ConvStem(nn.Module):
    """Patches from a small residual network, ``(B, 3, H, W) -> (B, dim, H / p, W / p)``: each stage halves sides, doubles width.

    The first stage, whose maps cost most, is one convolution.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        widths = [3, *(dim >> (stages - 1 - stage) for stage in range(stages))]
        self.down = nn.ModuleList(_convolution(a, b, stride=2) for a, b in itertools.pairwise(widths))
        self.residual = nn.ModuleList(
            nn.Sequential(_convolution(width, width), nn.ReLU(), _convolution(width, width)) for width in widths[2:]
        )
        self.project = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down[0](x).relu()
        for down, residual in zip(self.down[1:], self.residual, strict=True):
            x = down(x).relu()
            x = (x + residual(x)).relu()
        return self.project(x)


def _convolution(in_dim: int, dim: int, *, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.GroupNorm(8, dim))
