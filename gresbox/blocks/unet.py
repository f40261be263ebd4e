"""From a feature pyramid to one fine map, top down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape

__all__ = ["UNetDecoder"]


class UNetDecoder(nn.Module):
    r"""Fuse the levels of a pyramid into its finest one: upsample, join, two convolutions, level by level.

    .. math:: u_l = (\mathrm{ReLU} \circ \mathrm{BN} \circ W_{3\times3})^2\,[\mathrm{up}(u_{l+1});\; c_l],\quad
              u_{top} = c_{top},\quad S_{global} = u_1

    Paper: Ronneberger et al., "U-Net", arXiv:1505.04597, as IGVG, Sec. 3.1, decodes the global features.
    Differs from the paper: bilinear upsampling with aligned corners instead of transposed convolutions, as in the code of IGVG.

    Args:
        dim: Channels ``C`` of every level and of the result.
        num_levels: Levels of the pyramid.
        norm: Called with the channels; the default sees the batch in training and running statistics in evaluation.

    Shape:
        - ``levels``: maps ``(B, C, h_l, w_l)``, finest first; sizes need not divide each other.
        - returns ``(B, C, h_1, w_1)``, not negative; with one level that level.

    Raises:
        ValueError: If ``num_levels`` is below 1, the number of levels differs, or a shape does not fit.

    Example:
        >>> import torch
        >>> UNetDecoder(8, num_levels=2)([torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)]).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(self, dim: int = 256, *, num_levels: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        check_range("UNetDecoder", "num_levels", num_levels, 1)
        self.dim = dim

        def twice() -> nn.Sequential:
            first = nn.Conv2d(2 * dim, dim, 3, padding=1, bias=False), norm(dim), nn.ReLU()
            return nn.Sequential(*first, nn.Conv2d(dim, dim, 3, padding=1, bias=False), norm(dim), nn.ReLU())

        self.fuse = nn.ModuleList(twice() for _ in range(num_levels - 1))  # coarsest first

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        if len(levels) != len(self.fuse) + 1:
            raise ValueError(f"UNetDecoder: `levels` must be {len(self.fuse) + 1} maps, finest first, got {len(levels)}.")
        check_shape("UNetDecoder", **{f"levels[{i}]": (level, f"B {self.dim} * *") for i, level in enumerate(levels)})
        *finer, x = levels
        for fuse, level in zip(self.fuse, reversed(finer), strict=True):
            if x.shape[-2:] != level.shape[-2:]:
                x = F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=True)
            x = fuse(torch.cat([x, level], dim=1))
        return x
