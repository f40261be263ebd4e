"""Greedy choice of cells that have high scores and lie far apart."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from gresbox._checks import check_count, check_range, check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._precision import accumulation_dtype, no_autocast
from gresbox.ops._register import Forms, define_op

__all__ = ["select_points"]

_KERNEL_CELLS = 2**13  # that one program of the kernel holds
_TABLE_VALUES = 2**21


@torch.no_grad()
def select_points(
    score_map: Tensor,
    num_points: int,
    *,
    distance_weight: float = 0.003,
    normalize_distance: bool = True,
    apply_sigmoid: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""Choose the best cell, then again and again the cell with the best sum of its score and its distance to those chosen.

    .. math:: r_1 = \arg\max_p s_p,\qquad
              r_k = \arg\max_{p \notin \{r_1 \dots r_{k-1}\}} \Big(s_p + W \min_{j<k} \lVert p - r_j \rVert_2\Big),\qquad
              s = \sigma(M)

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG, an ICLR submission), Algorithm 1, the Dist-Score Point
    Selector.
    Differs from the paper: by default distances are divided by the diagonal of the map and :math:`W` is 0.003, as in the authors'
    code (Dmmm1997/InstanceVG, ``uni_gref_deformable_head.py``, line 234); the paper prints no value. Equal sums go to the lowest
    index: distances come from exact integer squares, so that equal distances are equal numbers. A step updates the distance to the
    nearest chosen cell for all cells and all images at once; nothing depends on the data, so nothing waits for the device. On the
    CPU distances are looked up in a table that is kept for the next call, unless the map is too large; on CUDA the whole loop is
    one launch. All forms choose the same cells on one device.

    Args:
        score_map: One score per cell; NaN is worse than every number. No gradient flows through a choice.
        num_points: How many cells are chosen.
        distance_weight: The weight ``W``; 0: the cells with the highest scores (top-k); large: farthest-point sampling.
        normalize_distance: Divide distances, in cells, by the diagonal ``sqrt(H^2 + W^2)``.
        apply_sigmoid: Squash the scores first, which the scale of ``distance_weight`` counts on.
        backend: ``"eager"``: the definition; ``"triton"``: the kernel, for at most 8,192 cells, or an error; ``"auto"``: the
            fastest form for this device and size.

    Shape:
        - ``score_map``: ``(B, H, W)``; returns ``(B, num_points)`` int64 in [0, H * W): ``row * W + column``, all different, in
          the order of selection.

    Raises:
        TypeError: If ``score_map`` is not floating-point or ``num_points`` no whole number.
        ValueError: If its shape does not fit, ``num_points`` is not in [1, H * W], or ``distance_weight`` is not in [0, 1e30].
        RuntimeError: If ``backend="triton"`` is not possible; the message says why.

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
    check_count(who, "num_points", num_points, 1, height * width)
    check_range(who, "distance_weight", distance_weight, 0, 1e30)  # more is infinite in float32
    kernel = _too_large(score_map, num_points, 0.0) or True
    by_kernel = use_triton(who, backend, score_map, kernel=kernel)
    with no_autocast(score_map):
        # Squashed here for all forms: another sigmoid, an ulp away, would decide some ties differently.
        scores = score_map.to(dtype).sigmoid() if apply_sigmoid else score_map.to(dtype)
        scale = distance_weight / (math.hypot(height, width) if normalize_distance else 1.0)
        if by_kernel:
            return _select(scores, num_points, scale)
        return (_greedy if backend == "eager" else _by_size)(scores, num_points, scale)


def _greedy(scores: Tensor, num_points: int, scale: float) -> Tensor:
    """The loop of Algorithm 1 for all images at once, ``(B, H, W) -> (B, num_points)``, with a running minimum of the distances."""
    height, width = scores.shape[1:]
    rows = torch.arange(height, device=scores.device, dtype=scores.dtype)
    columns = torch.arange(width, device=scores.device, dtype=scores.dtype)
    candidates = _finite(scores).flatten(1)  # (B, H*W)
    nearest = torch.full_like(scores, math.inf)  # squared distance to the nearest chosen cell
    chosen = [candidates.argmax(1)]  # the first of equal maxima
    while len(chosen) < num_points:
        last = chosen[-1][:, None]  # (B, 1)
        candidates = candidates.scatter(1, last, -math.inf)
        down, across = (rows - last // width).square(), (columns - last % width).square()  # (B, H), (B, W)
        nearest = torch.minimum(nearest, down[:, :, None] + across[:, None])
        bonus = nearest.sqrt() * scale  # rounded before it is added, here and in the other forms
        chosen.append((candidates + bonus.flatten(1)).argmax(1))
    return torch.stack(chosen, dim=1)


def _finite(scores: Tensor) -> Tensor:
    """Leave -inf to the chosen cells; NaN becomes the lowest number."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)


def _by_size(scores: Tensor, num_points: int, scale: float) -> Tensor:
    """The faster of the two PyTorch forms: a table on the CPU, the running minimum where there is none."""
    height, width = scores.shape[1:]
    # A table made while somebody traces would be a part of that trace, or no data at all.
    real = type(scores) is Tensor and scores.device.type == "cpu" and not torch.compiler.is_compiling()
    if not real or width * width * (2 * height - 1) > _TABLE_VALUES:
        return _greedy(scores, num_points, scale)
    bonuses, starts = _table(height, width, scale, scores.dtype, scores.device)
    candidates = _finite(scores).flatten(1)
    chosen = [candidates.argmax(1)]
    nearest = torch.full_like(candidates, math.inf)
    while len(chosen) < num_points:
        nearest = torch.minimum(nearest, bonuses.index_select(0, starts.index_select(0, chosen[-1])))
        chosen.append((candidates + nearest).argmax(1))
    return torch.stack(chosen, dim=1)


@functools.lru_cache(maxsize=4)
def _table(height: int, width: int, scale: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled distances from every cell to all cells, -inf to itself, as rows of ``(R, H*W)``, and each cell's row, ``(H*W,)``.

    Cells of one column see the same distances, shifted by whole rows of the map. So a column has one block of ``2 H - 1`` rows, and
    its cells have windows of it: ``W^2 (2 H - 1)`` numbers instead of ``W^2 H^2``.
    """
    rows = torch.arange(1 - height, height, dtype=dtype, device=device).square()
    columns = torch.arange(width, dtype=dtype, device=device)
    squares = rows[:, None] + (columns - columns[:, None]).square()[:, None]  # (W, 2H-1, W)
    block = 2 * height - 1
    bonuses = torch.where(squares == 0, -math.inf, squares.sqrt() * scale)
    windows = bonuses.as_strided((width * block - height + 1, height * width), (width, 1))
    cells = torch.arange(height * width, device=device)
    return windows, cells % width * block + (height - 1 - cells // width)


def _too_large(scores: Tensor, num_points: int, scale: float) -> str | None:
    cells = scores.shape[1] * scores.shape[2]
    return None if cells <= _KERNEL_CELLS else f"the map has {cells} cells and the kernel holds at most {_KERNEL_CELLS}"


def _launch(scores: Tensor, num_points: int, scale: float) -> Tensor:
    from gresbox.kernels.point_selection import select_points as launch

    return launch(scores, num_points, scale)


_select = define_op(
    "select_points(Tensor scores, int num_points, float scale) -> Tensor",
    fake=lambda scores, num_points, scale: scores.new_empty((scores.shape[0], num_points), dtype=torch.int64),
    forward=Forms(_by_size, _launch, _too_large),
)
