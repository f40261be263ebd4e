"""Dist-Score point selection: the whole greedy loop in one launch.

Which op: :func:`gresbox.ops.select_points`.
What one program owns: one image, all its cells in registers.
Reads and writes: the scores ``(B, H, W)`` once; the indices ``(B, K)``.
Deterministic: everything; squared distances are integers, the root is correctly rounded and no product is fused with a sum, so the
choice is the PyTorch form's, bit for bit, ties included.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._launch import Launch

__all__ = ["compilations", "select_points"]


@triton.jit
def _select_kernel(  # type: ignore[no-untyped-def]
    scores_pointer,
    indices_pointer,
    count,
    height,
    width,
    stride_image,
    stride_row,
    stride_column,
    scale,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    inside = cell < height * width
    row, column = cell // width, cell % width
    place = scores_pointer + image * stride_image + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    score = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    # NaN is the lowest number; infinities are the ends of the range; -inf is left to chosen cells and to what lies outside the map.
    score = tl.where(score != score, LOWEST, tl.minimum(tl.maximum(score, LOWEST), HIGHEST))
    score = tl.where(inside, score, float("-inf"))
    best = tl.argmax(score, 0, tie_break_left=True)
    tl.store(indices_pointer + image * count, best.to(tl.int64), mask=count > 0)
    nearest = tl.full((CELLS,), 2**30, tl.int32)  # squared distance to the nearest chosen cell
    for step in range(1, count):
        score = tl.where(cell == best, float("-inf"), score)
        down, across = row - best // width, column - best % width
        nearest = tl.minimum(nearest, down * down + across * across)
        # s + W min_j |p - r_j|
        total = score + tl.sqrt_rn(nearest.to(tl.float32)) * scale
        best = tl.argmax(total, 0, tie_break_left=True)
        tl.store(indices_pointer + image * count + step, best.to(tl.int64), mask=step < count)


def _select_launch(scores: Tensor, indices: Tensor, scale: float) -> Launch:
    images, height, width = scores.shape
    cells = max(triton.next_power_of_2(height * width), 128)
    limits = torch.finfo(torch.float32)
    arguments: dict[str, Any] = {
        "scores_pointer": scores,
        "indices_pointer": indices,
        "count": indices.shape[1],
        "height": height,
        "width": width,
        "stride_image": scores.stride(0),
        "stride_row": scores.stride(1),
        "stride_column": scores.stride(2),
        "scale": scale,
        "LOWEST": limits.min,
        "HIGHEST": limits.max,
        "CELLS": cells,
    }
    # A step is a reduction over the whole program, so few warps while a thread's cells fit its registers.
    warps = max(cells // 512, 1)
    return Launch(_select_kernel, (images,), arguments, warps=warps, stages=1, fp_fusion=False)


def select_points(scores: Tensor, num_points: int, scale: float) -> Tensor:
    """``(B, H, W)`` float32 scores to ``(B, num_points)`` int64 flat indices in order of selection."""
    indices = scores.new_empty((scores.shape[0], num_points), dtype=torch.int64)
    _select_launch(scores, indices, scale).run()
    return indices


def compilations(arch: str) -> dict[str, Launch]:
    """Launches for maps of the paper's size, its double, and the largest."""
    found = {}
    for side, points in ((20, 10), (60, 20), (90, 20)):
        scores = torch.empty((8, side, side), device="meta")
        indices = torch.empty((8, points), dtype=torch.int64, device="meta")
        found[f"{side} x {side}"] = _select_launch(scores, indices, 0.003 / side)
    return found
