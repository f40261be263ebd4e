"""Losses of matched boxes: L1 distance and generalised overlap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gresbox._checks import check_float
from gresbox.ops import box_cxcywh_to_xyxy, generalized_box_iou

__all__ = ["BoxLoss", "box_giou_loss", "box_l1_loss"]


def box_l1_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    r"""L1 distance of each box to its own target, summed over the four coordinates.

    .. math:: \lVert b - \hat b \rVert_1

    Paper: Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, Sec. 3.1.
    Differs from the paper: nothing; the sum over boxes and its normaliser are the caller's.

    Args:
        boxes: Predicted boxes.
        targets: The target of each.

    Shape:
        - both ``(..., 4)`` cxcywh; returns ``(...)`` of at least float32. Boxes outside [0, 1] are compared as they are.

    Raises:
        TypeError: If ``boxes`` is not floating-point.
        ValueError: If the shapes differ or the last axis is not 4.

    Example:
        >>> import torch
        >>> box_l1_loss(torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.5, 0.25, 0.2, 0.7]))
        tensor(0.7500)
    """
    boxes, targets = _checked("box_l1_loss", boxes, targets)
    return (boxes - targets).abs().sum(-1)


def box_giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    r"""One minus the generalised intersection over union of each box with its own target.

    .. math:: 1 - \mathrm{GIoU}(b, \hat b)

    Paper: Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630, Algorithm 2.
    Differs from the paper: a ratio without area counts as 0, with gradient 0: two boxes without area have loss 1 where they
    coincide.

    Args:
        boxes: Predicted boxes.
        targets: The target of each.

    Shape:
        - both ``(..., 4)`` cxcywh; returns ``(...)`` in [0, 2), of at least float32.

    Raises:
        TypeError: If ``boxes`` is not floating-point.
        ValueError: If the shapes differ or the last axis is not 4.

    Example:
        >>> import torch
        >>> box_giou_loss(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([0.5, 0.25, 1.0, 0.5]))
        tensor(0.5000)
    """
    boxes, targets = _checked("box_giou_loss", boxes, targets)
    pairs = (box_cxcywh_to_xyxy(boxes).reshape(-1, 1, 4), box_cxcywh_to_xyxy(targets).reshape(-1, 1, 4))
    # Each pair is a problem of its own; torchvision's loss for pairs picks out those that overlap, which waits for the device.
    return 1 - torch.vmap(generalized_box_iou)(*pairs).reshape(boxes.shape[:-1])


def _checked(who: str, boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the boxes' dtype, float32 at least."""
    check_float(who, boxes=boxes)
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{who}: `boxes` must be (..., 4), got {tuple(boxes.shape)}.")
    if targets.shape != boxes.shape:
        raise ValueError(f"{who}: `targets` must be {tuple(boxes.shape)} like `boxes`, got {tuple(targets.shape)}.")
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    return boxes.to(dtype), targets.to(dtype)


class BoxLoss(nn.Module):
    r"""L1 distance and generalised overlap of boxes with their own targets; see :func:`box_l1_loss` and :func:`box_giou_loss`.

    .. math:: \lVert b - \hat b \rVert_1, \quad 1 - \mathrm{GIoU}(b, \hat b)

    Paper: arXiv:2005.12872, Sec. 3.1; arXiv:1902.09630.
    Differs from the paper: nothing; weights, sum and normaliser are the caller's.

    Shape:
        - ``boxes``, ``targets``: ``(..., 4)`` cxcywh; returns two ``(...)``: L1 and GIoU loss.

    Example:
        >>> import torch
        >>> l1, giou = BoxLoss()(torch.rand(2, 3, 4), torch.rand(2, 3, 4))
        >>> l1.shape, giou.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def forward(self, boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return box_l1_loss(boxes, targets), box_giou_loss(boxes, targets)
