"""Dist-Score point selection as a loop that rebuilds the candidates and all distances in every step.

Of Dmmm1997/InstanceVG, ``instancevg/models/heads/uni_gref_deformable_head.py``, ``AQSM.point_selector`` (lines 234-295). As there
the images of a batch go together, one step at a time; a step lists the cells that are left, measures the distance of each to every
point that is chosen so far, and looks up the winner's index in the list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select_points_by_rebuilding(score_map: Tensor, num_points: int, *, distance_weight: float = 0.003) -> Tensor:
    """``(B, H, W)`` -> ``(B, num_points)`` int64 flat indices, in order of selection."""
    batch, height, width = score_map.shape
    images = torch.arange(batch, device=score_map.device)
    scores = score_map.sigmoid().flatten(1)  # (B, H*W)
    free = torch.ones_like(scores, dtype=torch.bool)
    first = scores.argmax(1)
    free[images, first] = False
    chosen = [first]
    points = torch.stack([first // width, first % width], -1).float()[:, None]  # (B, k, 2)
    for _ in range(num_points - 1):
        grid = torch.meshgrid(
            torch.arange(height, device=score_map.device), torch.arange(width, device=score_map.device), indexing="ij"
        )
        cells = torch.stack(grid, -1).flatten(0, 1).repeat(batch, 1, 1)[free].view(batch, -1, 2)  # (B, candidates, 2)
        nearest = torch.cdist(cells.float(), points).min(dim=2).values
        total = scores[free].view(batch, -1) + distance_weight * nearest / math.hypot(height, width)
        best = total.argmax(1)
        points = torch.cat([points, cells[images, best].float()[:, None]], 1)
        index = free.nonzero().view(batch, -1, 2)[images, best, 1]
        free[images, index] = False
        chosen.append(index)
    return torch.stack(chosen, 1)
