"""Multi-scale deformable attention by ``grid_sample``, all levels' samples stored.

Of huggingface/transformers v5.23.0, ``src/transformers/models/deformable_detr/modeling_deformable_detr.py``,
``MultiScaleDeformableAttention`` (lines 173-224), which is no public name of the library. As there the levels' samples are stacked,
weighed and summed in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_by_sampling(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """``(B, S, heads, D)``, ``(B, Q, heads, levels, points, 2)``, ``(B, Q, heads, levels, points)`` -> ``(B, Q, heads * D)``."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    parts = value.split([height * width for height, width in spatial_shapes], dim=1)
    grids = 2 * locations - 1
    samples = []
    for level, ((height, width), part) in enumerate(zip(spatial_shapes, parts, strict=True)):
        features = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*heads, Q, points, 2)
        samples.append(F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    weighed = torch.stack(samples, dim=-2).flatten(-2) * shares  # (B*heads, D, Q, levels*points)
    return weighed.sum(-1).view(batch, heads * channels, queries).transpose(1, 2).contiguous()
