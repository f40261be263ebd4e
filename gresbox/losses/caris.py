"""The training loss of CARIS: every pixel of the referred region is a two-class decision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_float, check_range, check_shape, check_targets
from gresbox.losses.targets import check_one_size, merged_targets
from gresbox.structures import GresOutput, GresTarget

__all__ = ["CarisCriterion", "weighted_cross_entropy"]

CLASS_WEIGHTS = (0.9, 1.1)
REDUCTIONS = ("batch", "sample")


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, *, class_weights: tuple[float, float] = CLASS_WEIGHTS, reduction: str = "batch"
) -> Tensor:
    r"""Cross-entropy of background and foreground, averaged with a weight per class.

    .. math:: L = \frac{\sum_p w_{y_p}\,\mathrm{softplus}\big((1 - 2 y_p)\, z_p\big)}{\sum_p w_{y_p}}

    With two logits per pixel, ``z`` is foreground minus background: their softmax depends on nothing else.

    Paper: the loss of CARIS' released code, github.com/lsa1997/CARIS, ``criterion.py``.
    Differs from that code: nothing by default. The sum of the weights depends on how many pixels of the batch are foreground, so
    the mean over two micro-batches is not quite the value of the whole batch; with ``reduction="sample"`` it is.

    Args:
        logits: Positive = foreground.
        targets: True, 1 or a share in [0, 1] on the foreground.
        class_weights: Weight of the background's pixels, and of the foreground's.
        reduction: ``"batch"``: one weighted mean over all pixels of the batch; ``"sample"``: the mean of one per sample.

    Shape:
        - both ``(B, H, W)``; returns a scalar of at least float32.

    Raises:
        ValueError: If the shapes disagree or ``reduction`` is unknown.
        TypeError: If the logits are not floating point.

    Example:
        >>> import torch
        >>> weighted_cross_entropy(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[True, True]]]))
        tensor(1.1269)
    """
    check_shape("weighted_cross_entropy", logits=(logits, "B H W"), targets=(targets, "B H W"))
    check_float("weighted_cross_entropy", logits=logits)
    check_choice("weighted_cross_entropy", "reduction", reduction, REDUCTIONS)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(1)
    share = targets.to(logits.dtype).flatten(1)
    background, foreground = class_weights
    loss = background * (1 - share) * F.softplus(logits) + foreground * share * F.softplus(-logits)
    weight = background * (1 - share) + foreground * share
    if reduction == "batch":
        return loss.sum() / weight.sum()
    return (loss.sum(1) / weight.sum(1)).mean()


class CarisCriterion(nn.Module):
    r"""The training loss of CARIS: weighted cross-entropy of the merged mask at the target's size.

    .. math:: L = \frac{\sum_p w_{y_p}\,\mathrm{softplus}\big((1 - 2 y_p)\, z_p\big)}{\sum_p w_{y_p}},\qquad
              w = (0.9,\; 1.1) \text{ for background, foreground}

    An expression without a target is a picture of background.

    Paper: the loss of CARIS' released code, github.com/lsa1997/CARIS, ``criterion.py``; see :func:`weighted_cross_entropy`.
    Differs from that code: nothing by default. It serves every model with merged logits, and looks at nothing but those.

    Args:
        class_weights: Weight of the background's pixels, and of the foreground's.
        reduction: ``"batch"``, as in CARIS: one weighted mean over all pixels of the batch; ``"sample"``: the mean of one per
            sample, which micro-batches and processes do not change.

    Shape:
        - ``output``: what a model returns; its merged logits are resized the model's own way (CARIS: corners aligned).
          ``targets``: one per image, all of one size.
        - returns a dict of float32 scalars: ``merged_ce`` and ``loss``, which are equal.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If targets differ in number, size or device from what the output asks for, a weight is not positive, or
            ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> output = GresOutput(torch.full((1, 8, 8), 3.0), align_corners=True)
        >>> CarisCriterion()(output, [GresTarget(torch.ones(2, 32, 32, dtype=torch.bool))])["loss"]
        tensor(0.0486)
    """

    def __init__(self, *, class_weights: tuple[float, float] = CLASS_WEIGHTS, reduction: str = "batch") -> None:
        super().__init__()
        check_choice("CarisCriterion", "reduction", reduction, REDUCTIONS)
        if len(class_weights) != 2:
            raise ValueError(f"CarisCriterion: `class_weights` must be two numbers, got {len(class_weights)}.")
        for weight in class_weights:
            check_range("CarisCriterion", "class_weights", weight, torch.finfo(torch.float32).tiny)
        self.class_weights = (class_weights[0], class_weights[1])
        self.reduction = reduction

    def forward(self, output: GresOutput, targets: Sequence[GresTarget]) -> dict[str, Tensor]:
        check_targets("CarisCriterion", targets, output.merged)
        check_one_size("CarisCriterion", targets)
        truth = merged_targets(targets)  # (B, H, W)
        logits = output.resized((truth.shape[-2], truth.shape[-1]))
        loss = weighted_cross_entropy(logits, truth, class_weights=self.class_weights, reduction=self.reduction).float()
        return {"loss": loss, "merged_ce": loss}

    def extra_repr(self) -> str:
        return f"class_weights={self.class_weights}, reduction={self.reduction!r}"
