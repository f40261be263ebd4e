"""Supervision of the text-to-image attention map, the "minimap", with the coarse target mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_float, check_shape
from gresbox.ops import mask_bce, mask_dice

__all__ = ["MinimapLoss", "minimap_loss"]


def minimap_loss(minimap: Tensor, merged: Tensor, *, resize: str = "nearest") -> tuple[Tensor, Tensor]:
    r"""Binary cross-entropy and dice of each image's minimap with its merged target at the minimap's size.

    .. math:: \mathrm{BCE}(\sigma(M_s), t), \quad 1 - \frac{2 \sum_x \sigma(M_s) t + 1}{\sum_x \sigma(M_s) + \sum_x t + 1}

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.1.1 names the supervision and prints no formula;
    code: Dmmm1997/InstanceVG, instancevg/models/heads/uni_gref_deformable_head.py.
    Differs from the code: nothing. There, too, the map, an attention probability, is taken as a logit: the loss is smallest where
    attention is 1 on the target and 0 elsewhere. A map of true logits may be given as well. Images without target take part,
    with an empty mask.

    Args:
        minimap: Attention of the text on the cells of the image.
        merged: Everything that is referred to, at any size.
        resize: ``"nearest"``: a cell is what its first pixel is, as in the code; ``"area"``: the covered fraction of a cell, in
            which small objects are not lost.

    Shape:
        - ``minimap``: ``(B, h, w)``, attention in [0, 1] or logits; ``merged``: ``(B, H, W)`` bool.
        - returns two ``(B,)``: bce and dice.

    Raises:
        TypeError: If ``minimap`` is not floating-point.
        ValueError: If the shapes disagree or ``resize`` is unknown.

    Example:
        >>> import torch
        >>> merged = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> merged[0, :2] = True
        >>> bce, dice = minimap_loss(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), merged)
        >>> bce, dice
        (tensor([0.5032]), tensor([0.2816]))
    """
    check_choice("minimap_loss", "resize", resize, ("nearest", "area"))
    check_shape("minimap_loss", minimap=(minimap, "B h w"), merged=(merged, "B H W"))
    check_float("minimap_loss", minimap=minimap)
    logits = minimap.to(torch.promote_types(minimap.dtype, torch.float32)).flatten(1)
    truth = F.interpolate(merged.to(logits.dtype)[:, None], size=minimap.shape[-2:], mode=resize).flatten(1)
    return mask_bce(logits, truth), mask_dice(logits, truth)


class MinimapLoss(nn.Module):
    r"""Binary cross-entropy plus dice of the minimap, averaged over the batch; see :func:`minimap_loss`.

    .. math:: \frac1B \sum_b \mathrm{BCE}(\sigma(M_b), t_b) + \mathrm{dice}(\sigma(M_b), t_b)

    Paper: IGVG, Sec. 3.1.1.
    Differs from the code: nothing; its factor 0.1 is the criterion's.

    Args:
        resize: ``"nearest"`` or ``"area"``.

    Shape:
        - ``minimap``: ``(B, h, w)``, attention in [0, 1] or logits; ``merged``: ``(B, H, W)`` bool; returns a scalar.

    Raises:
        ValueError: If ``resize`` is unknown.

    Example:
        >>> import torch
        >>> MinimapLoss()(torch.rand(2, 4, 4), torch.ones(2, 16, 16, dtype=torch.bool)).shape
        torch.Size([])
    """

    def __init__(self, *, resize: str = "nearest") -> None:
        super().__init__()
        check_choice("MinimapLoss", "resize", resize, ("nearest", "area"))
        self.resize = resize

    def forward(self, minimap: Tensor, merged: Tensor) -> Tensor:
        bce, dice = minimap_loss(minimap, merged, resize=self.resize)
        return (bce + dice).mean()

    def extra_repr(self) -> str:
        return f"resize={self.resize!r}"
