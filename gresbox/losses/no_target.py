"""Whether the expression refers to nothing, as a binary classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_float, check_range, check_shape

__all__ = ["NoTargetLoss", "no_target_loss"]


def no_target_loss(logits: Tensor, no_target: Tensor, *, class_weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    r"""Binary cross-entropy of the no-target logits, averaged over the batch.

    .. math:: L = \frac1B \sum_b w_{y_b}\, \mathrm{BCE}(\sigma(z_b), y_b), \quad y_b = 1 \text{ where nothing is referred to}

    Paper: arXiv:2411.15087, Sec. 3.6-3.7, Eq. (12)-(13).
    Differs from the paper: nothing by default. ReLA's class weights (0.9, 1.1) are an option; the sum is divided by B, not by
    the sum of the weights, so that the mean over micro-batches of equal size is the mean over the batch.

    Args:
        logits: No-target logits; positive = nothing is referred to.
        no_target: 1 or True where the expression refers to nothing.
        class_weights: Weight of samples with a target, and of those without.

    Shape:
        - both ``(B,)``; returns a scalar of at least float32.

    Raises:
        ValueError: If the shapes disagree.
        TypeError: If the logits are not floating point.

    Example:
        >>> import torch
        >>> no_target_loss(torch.tensor([4.0, -4.0]), torch.tensor([True, False]))
        tensor(0.0181)
    """
    check_shape("no_target_loss", logits=(logits, "B"), no_target=(no_target, "B"))
    check_float("no_target_loss", logits=logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = no_target.to(logits.dtype)
    with_target, without = class_weights
    loss = with_target * (1 - label) * F.softplus(logits) + without * label * F.softplus(-logits)
    return loss.mean()


class NoTargetLoss(nn.Module):
    r"""Binary cross-entropy of the no-target logits, as a module; see :func:`no_target_loss`.

    .. math:: L = \frac1B \sum_b w_{y_b}\, \mathrm{BCE}(\sigma(z_b), y_b)

    Paper: arXiv:2411.15087, Sec. 3.6-3.7, Eq. (12)-(13).
    Differs from the paper: nothing by default; the class weights are an option.

    Args:
        class_weights: Weight of samples with a target, and of those without.

    Shape:
        - ``logits``: ``(B,)``; ``no_target``: ``(B,)``, 1 = refers to nothing; returns a scalar.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> import torch
        >>> NoTargetLoss(class_weights=(0.9, 1.1))(torch.zeros(2), torch.tensor([1, 0]))
        tensor(0.6931)
    """

    def __init__(self, *, class_weights: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        for weight in class_weights:
            check_range("NoTargetLoss", "class_weights", weight, 0.0)
        self.class_weights = class_weights

    def forward(self, logits: Tensor, no_target: Tensor) -> Tensor:
        return no_target_loss(logits, no_target, class_weights=self.class_weights)

    def extra_repr(self) -> str:
        return f"class_weights={self.class_weights}"
