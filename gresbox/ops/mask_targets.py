"""Target masks of a batch in one padded tensor, at the size that predictions have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape

__all__ = ["stack_masks"]

MOST_AT_ONCE = 1 << 24  # pixels that are in float at one time on a GPU, unless one image has more


def stack_masks(
    masks: Sequence[Tensor], size: tuple[int, int] | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Pad the masks of several images to one tensor; each output pixel is the covered fraction of its area.

    On a GPU images of one size are averaged together, a bounded number of pixels at a time; nothing waits for the device.

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
    counts = [mask.shape[0] for mask in masks]
    shape = (len(masks), max(counts, default=0), *size)
    if 0 in shape:
        padded = torch.zeros(shape, dtype=dtype, device=masks[0].device if masks else None)
    elif masks[0].device.type == "cpu":
        padded = masks[0].new_zeros(shape, dtype=dtype)
        for index, mask in enumerate(masks):
            if counts[index]:
                padded[index, : counts[index]] = _area_average(mask, size)
    else:
        padded = _stack_together(masks, counts, size, dtype).view(shape)
    return padded, torch.tensor(counts, dtype=torch.int64)


def _stack_together(masks: Sequence[Tensor], counts: Sequence[int], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """All averages and what pads them, image after image, in few launches; no index has to travel to the device."""
    most = max(counts)
    none = masks[0].new_zeros((most - min(counts), *size), dtype=dtype)
    parts = [[none[: most - count]] for count in counts]
    for piece in _pieces(masks):
        averages = _area_average(torch.cat([masks[index] for index in piece]), size).to(dtype)
        for index, average in zip(piece, averages.split([counts[index] for index in piece]), strict=True):
            parts[index].insert(0, average)
    return torch.cat([part for of_image in parts for part in of_image if part.shape[0]])


def _pieces(masks: Sequence[Tensor]) -> list[list[int]]:
    """Which images are averaged at one time: of one size and dtype, with few enough pixels."""
    found: list[list[int]] = []
    growing: dict[tuple[int, int, torch.dtype], tuple[list[int], int]] = {}
    for index, mask in enumerate(masks):
        if mask.shape[0] == 0:
            continue
        key = (mask.shape[1], mask.shape[2], mask.dtype)
        piece, pixels = growing.get(key, ([], 0))
        if not piece or pixels + mask.numel() > MOST_AT_ONCE:
            piece, pixels = [], 0
            found.append(piece)
        piece.append(index)
        growing[key] = piece, pixels + mask.numel()
    return found


def _area_average(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """``(M, H, W)`` to ``(M, h, w)``, mean over the area that falls into each output pixel."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.adaptive_avg_pool2d(masks if masks.is_floating_point() else masks.float(), size)
