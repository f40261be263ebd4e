"""A feature pyramid from one map, as plain vision transformers need it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from gresbox._checks import check_choice, check_shape

__all__ = ["SimpleFeaturePyramid"]


class _LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, ``(B, C, h, w) -> (B, C, h, w)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SimpleFeaturePyramid(nn.Module):
    r"""Levels of several resolutions from the last map of a plain transformer: each is made from that map alone.

    .. math:: c_s = \mathrm{LN}(W_{3\times3} * \mathrm{LN}(W_{1\times1} * \mathrm{resize}_s(F)))

    ``resize`` is two transposed convolutions for scale 4, one for 2, nothing for 1 and max pooling for 1/2.

    Paper: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), arXiv:2203.16527, Sec. 3; the
    SimFPN of IGVG, Sec. 3.1.
    Differs from the paper: the norms' ``eps`` is 1e-5, which is what the code of IGVG comes to.

    Args:
        in_dim: Channels of the map, a multiple of 4 when there is scale 4, of 2 when there is scale 2.
        dim: Channels ``C`` of every level.
        scales: Resolution of each level relative to the map: 4, 2, 1 or 0.5, finest first.
        eps: The norms' epsilon.

    Shape:
        - ``features``: ``(B, in_dim, h, w)``, both sides at least 2 where 0.5 is among the scales.
        - returns one ``(B, C, h * s, w * s)`` per scale ``s``, rounded down.

    Raises:
        ValueError: If a scale is none of the four, the scales do not fall, ``in_dim`` does not divide, or a shape does not fit.

    Example:
        >>> import torch
        >>> levels = SimpleFeaturePyramid(16, 8)(torch.randn(1, 16, 4, 6))
        >>> [tuple(level.shape) for level in levels]
        [(1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3)]
    """

    def __init__(self, in_dim: int, dim: int = 256, *, scales: Sequence[float] = (4, 2, 1, 0.5), eps: float = 1e-5) -> None:
        super().__init__()
        who = "SimpleFeaturePyramid"
        for scale in scales:
            check_choice(who, "scales", scale, (4, 2, 1, 0.5))
        if not scales or any(fine <= coarse for fine, coarse in itertools.pairwise(scales)):
            raise ValueError(f"{who}: `scales` must fall, finest first, got {tuple(scales)}.")
        if in_dim % (4 if 4 in scales else 2 if 2 in scales else 1):
            raise ValueError(f"{who}: `in_dim` must be a multiple of {4 if 4 in scales else 2} for its finest scale, got {in_dim}.")
        self.in_dim, self.scales = in_dim, tuple(scales)
        self.resize = nn.ModuleList(self._resize(in_dim, scale, eps) for scale in scales)
        widths = [in_dim // int(max(scale, 1)) for scale in scales]
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), _LayerNorm2d(dim, eps=eps)) for width in widths
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), _LayerNorm2d(dim, eps=eps)) for _ in scales
        )

    @staticmethod
    def _resize(dim: int, scale: float, eps: float) -> nn.Module:
        if scale == 4:
            half = dim // 2
            first, second = nn.ConvTranspose2d(dim, half, 2, stride=2), nn.ConvTranspose2d(half, half // 2, 2, stride=2)
            return nn.Sequential(first, _LayerNorm2d(half, eps=eps), nn.GELU(), second)
        if scale == 2:
            return nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        return nn.Identity() if scale == 1 else nn.MaxPool2d(2, stride=2)

    def forward(self, features: Tensor) -> list[Tensor]:
        sizes = check_shape("SimpleFeaturePyramid", features=(features, f"B {self.in_dim} h w"))
        if 0.5 in self.scales and min(sizes["h"], sizes["w"]) < 2:
            raise ValueError(
                "SimpleFeaturePyramid: `features` must have at least 2 rows and columns for scale 0.5, "
                f"got {(sizes['h'], sizes['w'])}."
            )
        return [
            smooth(lateral(resize(features)))
            for resize, lateral, smooth in zip(self.resize, self.lateral, self.smooth, strict=True)
        ]
