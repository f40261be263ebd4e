"""Whether the expression refers to anything, from IGVG's existence logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_float, check_range, check_shape

__all__ = ["ExistenceLoss", "existence_loss"]


def existence_loss(
    logits: Tensor,
    no_target: Tensor,
    *,
    form: str = "two_class",
    class_weights: tuple[float, float] = (1.0, 1.0),
    reduction: str = "weights",
) -> Tensor:
    r"""Classification of images into "something is referred to" and "nothing is".

    .. math:: \text{two\_class: } \frac{-\sum_b w_{y_b} \log \mathrm{softmax}(z_b)_{y_b}}{\sum_b w_{y_b}}, \quad
        \text{bce: } \frac1B \sum_b \frac{w_{y_b}}K \sum_{k < K} \mathrm{BCE}(\sigma(z_{bk}), [y_b = k])

    with :math:`y_b = 0` where something is referred to and 1 where nothing is.

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.2, "Non-Target Branch"; code:
    Dmmm1997/InstanceVG, instancevg/models/losses/segloss.py.
    Differs from the paper: ``"bce"`` is the paper's binary cross-entropy, ``"two_class"`` the code's cross-entropy with class
    weights. With ``"bce"`` each logit is a probability of its own, so the sigmoid of logit 0, which the score product of
    inference reads, is trained as what it is read as.

    Args:
        logits: Index 0 = a target exists, index 1 = no target.
        no_target: 1 or True where nothing is referred to.
        form: ``"two_class"`` or ``"bce"``.
        class_weights: Weight of images with a target, and of those without; the code has (0.9, 1.1).
        reduction: ``"weights"``: divided by the sum of the weights, as in the code; ``"batch"``: by B, so that the mean over
            micro-batches of equal size is the mean over the batch.

    Shape:
        - ``logits``: ``(B, 2)``, with ``"bce"`` also ``(B, 1)``; ``no_target``: ``(B,)``; returns a scalar of at least float32.

    Raises:
        TypeError: If the logits are not floating-point.
        ValueError: If the shapes disagree or an option is unknown.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
        >>> existence_loss(logits, torch.tensor([False, True])), existence_loss(logits, torch.tensor([False, True]), form="bce")
        (tensor(0.0003), tensor(0.0181))
    """
    check_choice("existence_loss", "form", form, ("two_class", "bce"))
    check_choice("existence_loss", "reduction", reduction, ("weights", "batch"))
    single = form == "bce" and logits.ndim == 2 and logits.shape[1] == 1
    check_shape("existence_loss", logits=(logits, "B 1" if single else "B 2"), no_target=(no_target, "B"))
    check_float("existence_loss", logits=logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    without = no_target.to(logits.dtype)
    truth = torch.stack([1 - without, without], -1)  # (B, 2), one-hot
    weight = class_weights[0] * truth[:, 0] + class_weights[1] * truth[:, 1]
    if form == "two_class":
        loss = -(F.log_softmax(logits, -1) * truth).sum(-1)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, truth[:, : logits.shape[1]], reduction="none").mean(-1)
    return (weight * loss).sum() / (weight.sum() if reduction == "weights" else logits.shape[0])


class ExistenceLoss(nn.Module):
    r"""Classification of images into "something is referred to" and "nothing is", as a module; see :func:`existence_loss`.

    .. math:: \frac{-\sum_b w_{y_b} \log \mathrm{softmax}(z_b)_{y_b}}{\sum_b w_{y_b}}

    Paper: IGVG, Sec. 3.2, "Non-Target Branch".
    Differs from the paper: by default the code's two-class form with its weights; ``form="bce"`` is the paper's.

    Args:
        form: ``"two_class"`` or ``"bce"``.
        class_weights: Weight of images with a target, and of those without; None: the code's (0.9, 1.1) with ``"two_class"``, none
            with ``"bce"``.
        reduction: ``"weights"`` or ``"batch"``.

    Shape:
        - ``logits``: ``(B, 2)``, with ``"bce"`` also ``(B, 1)``; ``no_target``: ``(B,)``, 1 = refers to nothing; returns a scalar.

    Raises:
        ValueError: If an option is unknown or a weight negative.

    Example:
        >>> import torch
        >>> ExistenceLoss()(torch.zeros(2, 2), torch.tensor([1, 0]))
        tensor(0.6931)
    """

    def __init__(
        self, *, form: str = "two_class", class_weights: tuple[float, float] | None = None, reduction: str = "weights"
    ) -> None:
        super().__init__()
        check_choice("ExistenceLoss", "form", form, ("two_class", "bce"))
        check_choice("ExistenceLoss", "reduction", reduction, ("weights", "batch"))
        if class_weights is None:
            class_weights = (0.9, 1.1) if form == "two_class" else (1.0, 1.0)
        for weight in class_weights:
            check_range("ExistenceLoss", "class_weights", weight, 0.0)
        self.form, self.class_weights, self.reduction = form, class_weights, reduction

    def forward(self, logits: Tensor, no_target: Tensor) -> Tensor:
        return existence_loss(logits, no_target, form=self.form, class_weights=self.class_weights, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, class_weights={self.class_weights}, reduction={self.reduction!r}"
