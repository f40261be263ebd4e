"""Target masks of a batch in one padded tensor, at the size that predictions have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gresbox._checks import check_shape

__all__ = ["stack_masks"]


def stack_masks(
    masks: Sequence[Tensor], size: tuple[int, int] | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Pad the masks of several images to one tensor; each output pixel is the covered fraction of its area.

    Args:
        masks: One tensor per image; images may differ in size when ``size`` is given.
        size: Height and width of the result; None: the masks' own size, which must then be the same for all.
        dtype: Dtype of the result.

    Shape:
        - ``masks``: ``B`` tensors ``(M_b, H_b, W_b)``, bool or in [0, 1].
        - returns ``(B, M, h, w)``, M the largest ``M_b``, zeros behind each image's own; and all ``M_b``, ``(B,)`` int64, on CPU.

    Raises:
        ValueError: If a shape does not fit, or without ``size`` the images differ in size or there are none.

    Example:
        >>> import torch
        >>> some, none = torch.ones(2, 4, 4, dtype=torch.bool), torch.zeros(0, 4, 4, dtype=torch.bool)
        >>> padded, counts = stack_masks([some, none], (2, 2))
        >>> padded.shape, counts
        (torch.Size([2, 2, 2, 2]), tensor([2, 0]))
    """
    for index, mask in enumerate(masks):
        check_shape("stack_masks", **{f"masks[{index}]": (mask, "M H W")})
    sizes = {(mask.shape[1], mask.shape[2]) for mask in masks}
    if size is None:
        if len(sizes) != 1:
            raise ValueError(f"stack_masks: `masks` must have one size when `size` is None, got {sorted(sizes)}.")
        size = sizes.pop()
    counts = torch.tensor([mask.shape[0] for mask in masks], dtype=torch.int64)
    if not masks:
        return torch.zeros((0, 0, *size), dtype=dtype), counts
    # One image at a time: the batch's masks at full size in float are never held at once.
    return pad_sequence([_area_average(mask, size).to(dtype) for mask in masks], batch_first=True), counts


def _area_average(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(M, H, W)`` to ``(M, h, w)``, mean over the area that falls into each output pixel."""
    masks = masks if masks.is_floating_point() else masks.float()
    if tuple(masks.shape[-2:]) == tuple(size) or masks.shape[0] == 0:
        return masks if masks.shape[0] else masks.new_zeros((0, *size))
    return F.interpolate(masks[:, None], size=size, mode="area")[:, 0]
