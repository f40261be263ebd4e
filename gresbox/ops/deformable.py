"""Multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["deformable_attention"]


def deformable_attention(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted sum of a few sampled points per query, head and level.

    .. math:: \sum_{l,k} A_{qhlk}\; v_{lh}(x_{qhlk})

    Paper: Zhu et al., "Deformable DETR", arXiv:2010.04159, Eq. (3), without the projections around it.
    Differs from the paper: nothing. Bilinear between pixel centres (pixel ``x W - 0.5``), zero outside the level.

    Args:
        value: Features of all levels, one after the other, row by row.
        spatial_shapes: Height and width of each level; their areas add up to ``S``.
        locations: Where to sample, xy relative to each level.
        weights: Weight of each sample; the caller's softmax over levels and points.

    Shape:
        - ``value``: ``(B, S, heads, D)``; ``locations``: ``(B, Q, heads, levels, points, 2)`` xy, the level is [0, 1];
          ``weights``: ``(B, Q, heads, levels, points)``; returns ``(B, Q, heads * D)``.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> value = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> deformable_attention(value, [(1, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1))
        tensor([[[2.]]])
    """
    who = "deformable_attention"
    sizes = check_shape(
        who,
        value=(value, "B S heads D"),
        locations=(locations, "B Q heads levels points 2"),
        weights=(weights, "B Q heads levels points"),
    )
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    areas = [height * width for height, width in shapes]
    if len(shapes) != sizes["levels"] or sum(areas) != sizes["S"]:
        expected = f"{sizes['levels']} levels with {sizes['S']} pixels in all"
        raise ValueError(f"{who}: `spatial_shapes` must be {expected}, got {shapes}.")
    dtype = accumulation_dtype(who, value=value, locations=locations, weights=weights)
    batch, heads, channels, queries = sizes["B"], sizes["heads"], sizes["D"], sizes["Q"]
    if 0 in tuple(sizes.values()):  # grid_sample takes no empty map
        return value.new_zeros((batch, queries, heads * channels))
    with no_autocast(value):
        maps = value.to(dtype).permute(0, 2, 3, 1).split(areas, dim=-1)  # levels of (B, heads, D, H*W)
        grids = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B*heads, Q, points, 2)
        shares = weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (levels, B*heads, 1, Q, points)
        out = torch.zeros((), dtype=dtype, device=value.device)
        for level, (shape, grid, share) in enumerate(zip(shapes, grids.unbind(0), shares.unbind(0), strict=True)):
            features = maps[level].reshape(batch * heads, channels, *shape)
            samples = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            out = out + (samples * share).sum(-1)  # (B*heads, D, Q)
        out = out.view(batch, heads * channels, queries).mT
    return out.to(value.dtype).contiguous()
