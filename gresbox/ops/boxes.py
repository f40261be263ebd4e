"""Boxes: the two notations, and pairwise overlap that stays finite for boxes without area."""

from __future__ import annotations

import torch
from torch import Tensor

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["box_cxcywh_to_xyxy", "box_iou", "box_xyxy_to_cxcywh", "generalized_box_iou"]


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre, width and height to the corners.

    Args:
        boxes: Boxes as centre, width, height.

    Shape:
        - ``boxes``: ``(..., 4)``; returns ``(..., 4)``.

    Raises:
        ValueError: If the last axis is not 4.

    Example:
        >>> import torch
        >>> box_cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 1.0, 0.5]))
        tensor([0.0000, 0.2500, 1.0000, 0.7500])
    """
    return _convert("box_cxcywh_to_xyxy", boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre, width and height.

    Args:
        boxes: Boxes as left, top, right, bottom.

    Shape:
        - ``boxes``: ``(..., 4)``; returns ``(..., 4)``.

    Raises:
        ValueError: If the last axis is not 4.

    Example:
        >>> import torch
        >>> box_xyxy_to_cxcywh(torch.tensor([0.0, 0.25, 1.0, 0.75]))
        tensor([0.5000, 0.5000, 1.0000, 0.5000])
    """
    return _convert("box_xyxy_to_cxcywh", boxes, "xyxy", "cxcywh")


def _convert(who: str, boxes: Tensor, source: str, target: str) -> Tensor:
    from torchvision.ops import box_convert

    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{who}: `boxes` must be (..., 4), got {tuple(boxes.shape)}.")
    return box_convert(boxes, source, target)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair; 0 where both boxes have no area (torchvision's gives NaN there).

    Args:
        boxes1: Boxes as corners.
        boxes2: Boxes as corners.

    Shape:
        - ``boxes1``: ``(N, 4)`` xyxy; ``boxes2``: ``(M, 4)`` xyxy; returns ``(N, M)`` in [0, 1].

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]))
        tensor([[0.3333, 0.0000]])
    """
    check_shape("box_iou", boxes1=(boxes1, "N 4"), boxes2=(boxes2, "M 4"))
    dtype = accumulation_dtype("box_iou", boxes1=boxes1, boxes2=boxes2)
    with no_autocast(boxes1):
        overlap, union = _overlap_and_union(boxes1.to(dtype), boxes2.to(dtype))
        return _ratio(overlap, union).to(boxes1.dtype)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    r"""Generalised intersection over union of every pair; finite for boxes without area.

    .. math:: \mathrm{IoU} - \frac{|C| - |A \cup B|}{|C|}, \quad C \text{ the smallest box around both}

    Paper: Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630, Algorithm 1.
    Differs from the paper: a ratio whose denominator is zero counts as 0.

    Args:
        boxes1: Boxes as corners.
        boxes2: Boxes as corners.

    Shape:
        - ``boxes1``: ``(N, 4)`` xyxy; ``boxes2``: ``(M, 4)`` xyxy; returns ``(N, M)`` in (-1, 1].

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> generalized_box_iou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[3.0, 0.0, 4.0, 1.0]]))
        tensor([[-0.5000]])
    """
    check_shape("generalized_box_iou", boxes1=(boxes1, "N 4"), boxes2=(boxes2, "M 4"))
    dtype = accumulation_dtype("generalized_box_iou", boxes1=boxes1, boxes2=boxes2)
    with no_autocast(boxes1):
        first, second = boxes1.to(dtype), boxes2.to(dtype)
        overlap, union = _overlap_and_union(first, second)
        low = torch.minimum(first[:, None, :2], second[:, :2])
        high = torch.maximum(first[:, None, 2:], second[:, 2:])
        around = _area(high - low)
        return (_ratio(overlap, union) - _ratio(around - union, around)).to(boxes1.dtype)


def _overlap_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of every pair, ``(N, M)`` each."""
    from torchvision.ops import box_area

    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    overlap = _area(high - low)
    return overlap, box_area(first)[:, None] + box_area(second) - overlap


def _area(sides: Tensor) -> Tensor:
    """Width times height ``(..., 2)``, negative ones counted as 0; not ``prod``, whose gradient waits for the device."""
    width, height = sides.clamp(min=0).unbind(-1)
    return width * height


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, 0 with zero gradient where there is no whole."""
    some = whole > 0
    return torch.where(some, part / torch.where(some, whole, 1), 0)
