"""Choose prior points on a score map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gresbox._checks import check_range
from gresbox.ops import select_points

__all__ = ["DistScorePointSelector", "cell_centres"]


def cell_centres(indices: Tensor, height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres of cells that are given as flat indices.

    Args:
        indices: ``row * width + column``.
        height: Rows of the map.
        width: Columns of the map.
        dtype: The result's dtype.

    Shape:
        - ``indices``: any shape, integers; returns ``(..., 2)``, xy in (0, 1).

    Example:
        >>> import torch
        >>> cell_centres(torch.tensor([0, 5]), 2, 4)
        tensor([[0.1250, 0.2500],
                [0.3750, 0.7500]])
    """
    column, row = (indices % width).to(dtype), (indices // width).to(dtype)
    return torch.stack([(column + 0.5) / width, (row + 0.5) / height], dim=-1)


class DistScorePointSelector(nn.Module):
    r"""Choose points with high scores that lie far apart, so that they cover as many instances as possible.

    .. math:: r_k = \arg\max_{p \notin R} \Big(\sigma(M_p) + W \min_{r \in R} \lVert p - r \rVert_2\Big)

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.1, Algorithm 1.
    Differs from the paper: distances are divided by the diagonal of the map, as in the authors' code; the paper gives no value
    for ``W``.

    Args:
        num_points: Points ``K``.
        distance_weight: The weight ``W``. 0 chooses the cells with the highest scores: the paper's top-k baseline (Table 6,
            Fig. 4).
        normalize_distance: Divide distances, in cells, by the map's diagonal; off: Algorithm 1 as printed.

    Shape:
        - ``score_map``: ``(B, H, W)``; its sigmoid is the score.
        - returns ``indices`` ``(B, K)`` int64, ``row * W + column`` in order of selection, and ``points`` ``(B, K, 2)`` float32
          (float64 for float64), xy of the cells' centres in (0, 1). Neither has a gradient.

    Raises:
        ValueError: If ``num_points`` is below 1 or above the number of cells, or ``distance_weight`` is not in [0, 1e30].

    Example:
        >>> import torch
        >>> indices, points = DistScorePointSelector(2)(torch.tensor([[[0.0, 3.0], [1.0, 2.0]]]))
        >>> indices, points[0, 0]
        (tensor([[1, 3]]), tensor([0.7500, 0.2500]))
    """

    def __init__(self, num_points: int = 10, *, distance_weight: float = 0.003, normalize_distance: bool = True) -> None:
        super().__init__()
        check_range("DistScorePointSelector", "num_points", num_points, 1)
        check_range("DistScorePointSelector", "distance_weight", distance_weight, 0, 1e30)
        self.num_points, self.distance_weight, self.normalize_distance = num_points, distance_weight, normalize_distance

    def forward(self, score_map: Tensor) -> tuple[Tensor, Tensor]:
        indices = select_points(
            score_map, self.num_points, distance_weight=self.distance_weight, normalize_distance=self.normalize_distance
        )
        dtype = torch.promote_types(score_map.dtype, torch.float32)
        return indices, cell_centres(indices, score_map.shape[1], score_map.shape[2], dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.num_points}, distance_weight={self.distance_weight}, normalize_distance={self.normalize_distance}"
