"""The two losses of one predicted mask against its target."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["mask_bce", "mask_dice"]


def mask_bce(masks: Tensor, targets: Tensor) -> Tensor:
    r"""Binary cross-entropy of each mask, averaged over its pixels or points.

    .. math:: \frac1P \sum_x \mathrm{softplus}(s_x) - s_x y_x

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.3.
    Differs from the paper: nothing; the sum over masks and its normaliser are the caller's.

    Args:
        masks: Mask logits.
        targets: The truth; bool, or fractions of pixels.

    Shape:
        - ``masks``: ``(K, P)``; ``targets``: ``(K, P)`` in [0, 1]; returns ``(K,)``, 0 without pixels.

    Raises:
        TypeError: If ``masks`` is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> mask_bce(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]))
        tensor([0.6931])
    """
    sizes = check_shape("mask_bce", masks=(masks, "K P"), targets=(targets, "K P"))
    dtype = accumulation_dtype("mask_bce", masks=masks)
    with no_autocast(masks):
        terms = F.binary_cross_entropy_with_logits(masks.to(dtype), targets.to(dtype), reduction="none")
        return (terms.sum(-1) / max(sizes["P"], 1)).to(masks.dtype)


def mask_dice(masks: Tensor, targets: Tensor) -> Tensor:
    r"""Dice distance of each mask, smoothed by 1.

    .. math:: 1 - \frac{2 \sum_x \sigma(s_x) y_x + 1}{\sum_x \sigma(s_x) + \sum_x y_x + 1}

    Paper: Milletari et al., "V-Net", arXiv:1606.04797, with the smoothing of Cheng et al., arXiv:2112.01527.
    Differs from the paper: nothing.

    Args:
        masks: Mask logits.
        targets: The truth; bool, or fractions of pixels.

    Shape:
        - ``masks``: ``(K, P)``; ``targets``: ``(K, P)`` in [0, 1]; returns ``(K,)`` in [0, 1).

    Raises:
        TypeError: If ``masks`` is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> mask_dice(torch.tensor([[50.0, -50.0]]), torch.tensor([[True, False]]))
        tensor([0.])
    """
    check_shape("mask_dice", masks=(masks, "K P"), targets=(targets, "K P"))
    dtype = accumulation_dtype("mask_dice", masks=masks)
    with no_autocast(masks):
        probs, truth = masks.to(dtype).sigmoid(), targets.to(dtype)
        overlap = (probs * truth).sum(-1)
        return (1 - (2 * overlap + 1) / (probs.sum(-1) + truth.sum(-1) + 1)).to(masks.dtype)
