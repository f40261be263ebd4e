"""Greedy choice of cells that have high scores and lie far apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gresbox._checks import check_range, check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["select_points"]


@torch.no_grad()
def select_points(
    score_map: Tensor,
    num_points: int,
    *,
    distance_weight: float = 0.003,
    normalize_distance: bool = True,
    apply_sigmoid: bool = True,
) -> Tensor:
    r"""Choose the best cell, then again and again the cell with the best sum of its score and its distance to those chosen.

    .. math:: r_1 = \arg\max_p s_p,\qquad
              r_k = \arg\max_{p \notin \{r_1 \dots r_{k-1}\}} \Big(s_p + W \min_{j<k} \lVert p - r_j \rVert_2\Big),\qquad
              s = \sigma(M)

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG, an ICLR submission), Algorithm 1, the Dist-Score Point
    Selector.
    Differs from the paper: by default distances are divided by the diagonal of the map and :math:`W` is 0.003, as in the authors'
    code (Dmmm1997/InstanceVG, ``uni_gref_deformable_head.py``, line 234); the paper prints no value. Equal sums go to the lowest
    index: distances come from exact integer squares, so that equal distances are equal numbers. A step updates the nearest chosen
    cell of all cells and all images at once; nothing depends on the data, so nothing waits for the device.

    Args:
        score_map: One score per cell; NaN is worse than every number. No gradient flows through a choice.
        num_points: How many cells are chosen.
        distance_weight: The weight ``W``; 0: the cells with the highest scores (top-k); large: farthest-point sampling.
        normalize_distance: Divide distances, in cells, by the diagonal ``sqrt(H^2 + W^2)``.
        apply_sigmoid: Squash the scores first, which the scale of ``distance_weight`` counts on.

    Shape:
        - ``score_map``: ``(B, H, W)``; returns ``(B, num_points)`` int64 in [0, H * W): ``row * W + column``, all different, in
          the order of selection.

    Raises:
        TypeError: If ``score_map`` is not floating-point.
        ValueError: If its shape does not fit, ``num_points`` is not in [1, H * W], or ``distance_weight`` is not in [0, 1e30].

    Example:
        >>> import torch
        >>> scores = torch.tensor([[[0.9, 0.8, 0.0], [0.0, 0.0, 0.5]]])
        >>> select_points(scores, 2), select_points(scores, 2, distance_weight=1.0)
        (tensor([[0, 1]]), tensor([[0, 5]]))
    """
    who = "select_points"
    sizes = check_shape(who, score_map=(score_map, "B H W"))
    dtype = accumulation_dtype(who, score_map=score_map)
    height, width = sizes["H"], sizes["W"]
    check_range(who, "num_points", num_points, 1, height * width)
    check_range(who, "distance_weight", distance_weight, 0, 1e30)  # more is infinite in float32
    with no_autocast(score_map):
        scores = score_map.to(dtype).sigmoid() if apply_sigmoid else score_map.to(dtype)
        limits = torch.finfo(dtype)
        scores = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)  # leaves -inf to the chosen cells
        scale = distance_weight / (math.hypot(height, width) if normalize_distance else 1.0)
        return _greedy(scores, num_points, scale)


def _greedy(scores: Tensor, num_points: int, scale: float) -> Tensor:
    """The loop of Algorithm 1 for all images at once, ``(B, H, W) -> (B, num_points)``."""
    height, width = scores.shape[1:]
    rows = torch.arange(height, device=scores.device, dtype=scores.dtype)
    columns = torch.arange(width, device=scores.device, dtype=scores.dtype)
    candidates = scores.flatten(1)  # (B, H*W)
    nearest = torch.full_like(scores, math.inf)  # squared distance to the nearest chosen cell
    chosen = [candidates.argmax(1)]  # the first of equal maxima
    while len(chosen) < num_points:
        last = chosen[-1][:, None]  # (B, 1)
        candidates = candidates.scatter(1, last, -math.inf)
        down, across = (rows - last // width).square(), (columns - last % width).square()  # (B, H), (B, W)
        nearest = torch.minimum(nearest, down[:, :, None] + across[:, None])
        chosen.append(torch.add(candidates, nearest.sqrt().flatten(1), alpha=scale).argmax(1))
    return torch.stack(chosen, dim=1)
