"""gRefCOCO: gIoU, cIoU, N_acc, T_acc and Pr@X as the benchmark's own evaluator defines them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from gresbox._checks import check_choice, check_range, check_shape

__all__ = ["GRESMetric", "gres_metrics"]

THRESHOLDS = (0.7, 0.8, 0.9)
RULES = ("empty_mask", "pixels")
_SUMS = {  # name: (shape, dtype)
    "iou": ((), torch.float64),
    "intersection": ((), torch.int64),
    "union": ((), torch.int64),
    "hits": ((len(THRESHOLDS),), torch.int64),  # expressions with a target and an IoU of at least each threshold
    "right_none": ((), torch.int64),
    "missed_none": ((), torch.int64),
    "right_some": ((), torch.int64),
    "missed_some": ((), torch.int64),
}


class GRESMetric(Metric):
    r"""The metrics of the gRefCOCO benchmark, in percent, summed over batches and processes.

    With :math:`P` predicted and :math:`Z` true "no target", :math:`I = |m \cap m^*|` and :math:`U = |m \cup m^*|` per expression:

    .. math::
        \mathrm{IoU} = \begin{cases} [P] & Z \\ 0 & \bar Z P \\ I / \max(U, 1) & \bar Z \bar P \end{cases} \qquad
        \mathrm{gIoU} = \mathrm{mean}(\mathrm{IoU}) \qquad
        \mathrm{cIoU} = \frac{\sum_{\bar Z \bar P} I}{\sum_{\overline{Z P}} U}

    ``N_acc`` and ``T_acc`` are the shares of no-target and of targeted expressions whose :math:`P` is right; ``Pr@X`` is the share
    of targeted expressions with :math:`\mathrm{IoU} \ge X`.

    Paper: Liu et al., "GRES: Generalized Referring Expression Segmentation", arXiv:2306.00968, Sec. 3.3, and the evaluator of its
    released code.
    Differs from that code: ``N_acc`` and ``T_acc`` are in percent as in the papers' tables, not fractions; where the code divides
    by zero the value is NaN with one warning. As there, ``N_acc`` and ``T_acc`` are 0 when there is no no-target expression.

    Args:
        no_target_rule: How an update without ``pred_no_target`` decides: ``"empty_mask"``, no predicted pixel; ``"pixels"``, fewer
            than ``min_pixels``, and such a mask is emptied.
        min_pixels: Of the rule ``"pixels"``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; ``pred_no_target``,
          ``target_no_target`` ``(B,)`` bool or None. None for the target means: its mask is empty.
        - :meth:`compute`: a dict of float64 scalars ``gIoU``, ``cIoU``, ``N_acc``, ``T_acc``, ``Pr@0.7``, ``Pr@0.8``, ``Pr@0.9``.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks or flags are not bool.

    Example:
        >>> import torch
        >>> target = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> target[0, :2] = True  # the second expression has no target
        >>> metric = GRESMetric()
        >>> metric.update(target, target)
        >>> {name: round(float(value), 1) for name, value in metric.compute().items()}
        {'gIoU': 100.0, 'cIoU': 100.0, 'N_acc': 100.0, 'T_acc': 100.0, 'Pr@0.7': 100.0, 'Pr@0.8': 100.0, 'Pr@0.9': 100.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    iou: Tensor
    intersection: Tensor
    union: Tensor
    hits: Tensor
    right_none: Tensor
    missed_none: Tensor
    right_some: Tensor
    missed_some: Tensor

    def __init__(self, *, no_target_rule: str = "empty_mask", min_pixels: int = 50, **kwargs: object) -> None:
        super().__init__(**kwargs)
        _check_options("GRESMetric", no_target_rule, min_pixels)
        self.no_target_rule = no_target_rule
        self.min_pixels = min_pixels
        for name, (shape, dtype) in _SUMS.items():
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(
        self,
        pred: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        pred_no_target: Tensor | None = None,
        target_no_target: Tensor | None = None,
    ) -> None:
        """Add a batch of expressions."""
        rows = _score("GRESMetric.update", pred, target, pred_no_target, target_no_target, self._min_pixels)
        for name, value in _sums(rows).items():
            setattr(self, name, getattr(self, name) + value.to(getattr(self, name).device))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything added so far."""
        return _ratios("GRESMetric.compute", {name: getattr(self, name) for name in _SUMS})

    @property
    def _min_pixels(self) -> int:
        return self.min_pixels if self.no_target_rule == "pixels" else 1


def gres_metrics(
    pred: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    pred_no_target: Tensor | None = None,
    target_no_target: Tensor | None = None,
    *,
    no_target_rule: str = "empty_mask",
    min_pixels: int = 50,
    per_sample: bool = False,
) -> dict[str, Tensor]:
    """The metrics of :class:`GRESMetric` of all expressions at once.

    Args:
        pred: Predicted masks.
        target: True masks, each of its prediction's size.
        pred_no_target: Whether "nothing" is the answer; None: ``no_target_rule`` decides from the mask.
        target_no_target: Whether "nothing" is the truth; None: whether the true mask is empty.
        no_target_rule: ``"empty_mask"`` or ``"pixels"``; see :class:`GRESMetric`.
        min_pixels: Of the rule ``"pixels"``.
        per_sample: Also return each expression's ``no_target`` (the prediction), ``intersection``, ``union`` and ``iou`` as they
            enter the sums; ``iou`` in [0, 1].

    Shape:
        - ``pred``, ``target``: ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; flags ``(B,)`` bool.
        - returns float64 scalars in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks or flags are not bool.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 1]]], dtype=torch.bool)
        >>> target = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
        >>> scores = gres_metrics(pred, target)
        >>> [round(float(scores[name]), 2) for name in ("gIoU", "cIoU", "N_acc", "T_acc")]
        [33.33, 50.0, 0.0, 100.0]
    """
    _check_options("gres_metrics", no_target_rule, min_pixels)
    least = min_pixels if no_target_rule == "pixels" else 1
    rows = _score("gres_metrics", pred, target, pred_no_target, target_no_target, least)
    result = _ratios("gres_metrics", _sums(rows))
    if per_sample:
        result |= {"no_target": rows["no_target"], **{name: rows[name] for name in ("intersection", "union", "iou")}}
    return result


def _check_options(who: str, rule: str, min_pixels: int) -> None:
    check_choice(who, "no_target_rule", rule, RULES)
    check_range(who, "min_pixels", min_pixels, low=1)


def _check_masks(who: str, pred: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> None:
    """Same number of masks, pairwise of one size, all bool."""
    if isinstance(pred, Tensor) and isinstance(target, Tensor):
        check_shape(who, pred=(pred, "B H W"), target=(target, "B H W"))
        pairs = [("pred", pred), ("target", target)]
    else:
        if len(pred) != len(target):
            raise ValueError(f"{who}: `target` must be as many masks as `pred`, {len(pred)}, got {len(target)}.")
        pairs = []
        for index, (one, other) in enumerate(zip(pred, target, strict=True)):
            names = (f"pred[{index}]", f"target[{index}]")
            check_shape(who, **{names[0]: (one, "H W"), names[1]: (other, "H W")})
            pairs += [(names[0], one), (names[1], other)]
    for name, mask in pairs:
        if mask.dtype != torch.bool:
            raise TypeError(f"{who}: `{name}` must be bool (logits > 0, probabilities > 0.5), got {mask.dtype}.")


def _check_flags(who: str, argument: str, flags: Tensor | None, count: int) -> None:
    if flags is None:
        return
    if not isinstance(flags, Tensor):
        raise TypeError(f"{who}: `{argument}` must be a bool tensor, got {type(flags).__name__}.")
    if flags.dtype != torch.bool:
        raise TypeError(f"{who}: `{argument}` must be bool, got {flags.dtype}.")
    if tuple(flags.shape) != (count,):
        raise ValueError(f"{who}: `{argument}` must be (B,) with B={count}, got {tuple(flags.shape)}.")


def _pixels(masks: Sequence[Tensor]) -> Tensor:
    """True pixels of each mask, ``(B,)`` int64 on the masks' device, without a sync."""
    if len(masks) == 0:
        return torch.zeros(0, dtype=torch.int64)
    if masks[0].device.type == "cpu":  # numpy counts bools eight at a time: 6 to 100 times as fast as torch's count or sum
        return torch.tensor([np.count_nonzero(mask.numpy()) for mask in masks])
    return torch.stack([torch.count_nonzero(mask) for mask in masks])


def _score(
    who: str,
    pred: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    pred_no_target: Tensor | None,
    target_no_target: Tensor | None,
    min_pixels: int,
) -> dict[str, Tensor]:
    """Each expression's row of the evaluator's truth table."""
    _check_masks(who, pred, target)
    _check_flags(who, "pred_no_target", pred_no_target, len(pred))
    _check_flags(who, "target_no_target", target_no_target, len(pred))
    shared = [one & other.to(one.device) for one, other in zip(pred, target, strict=True)]
    predicted, both = _pixels(list(pred)), _pixels(shared)
    true = _pixels(list(target)).to(predicted.device)
    if pred_no_target is None:
        says_none = predicted < min_pixels
        predicted, both = predicted.masked_fill(says_none, 0), both.masked_fill(says_none, 0)
    else:
        says_none = pred_no_target.to(predicted.device)
    is_none = true == 0 if target_no_target is None else target_no_target.to(predicted.device)
    intersection = both.masked_fill(says_none | is_none, 0)
    union = (predicted + true - both).masked_fill(says_none & is_none, 0)
    overlap = intersection.double() / union.clamp(min=1).double()
    return {
        "no_target": says_none,
        "target_no_target": is_none,
        "intersection": intersection,
        "union": union,
        "iou": torch.where(is_none, says_none.double(), overlap),
    }


def _sums(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    says_none, is_none, iou = rows["no_target"], rows["target_no_target"], rows["iou"]
    levels = torch.tensor(THRESHOLDS, dtype=torch.float64, device=iou.device)  # a float32 0.7 would let 0.6999999 pass
    return {
        "iou": iou.sum(),
        "intersection": rows["intersection"].sum(),
        "union": rows["union"].sum(),
        "hits": ((iou[:, None] >= levels) & ~is_none[:, None]).sum(0),
        "right_none": (is_none & says_none).sum(),
        "missed_none": (is_none & ~says_none).sum(),
        "right_some": (~is_none & ~says_none).sum(),
        "missed_some": (~is_none & says_none).sum(),
    }


def _ratios(who: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Percentages; 0 / 0 is NaN, and one warning names them all."""
    none = sums["right_none"] + sums["missed_none"]
    some = sums["right_some"] + sums["missed_some"]

    def percent(part: Tensor, whole: Tensor) -> Tensor:
        return 100.0 * (part.double() / whole.double())

    accuracy = {"N_acc": percent(sums["right_none"], none), "T_acc": percent(sums["right_some"], some)}
    result = {
        "gIoU": percent(sums["iou"], none + some),
        "cIoU": percent(sums["intersection"], sums["union"]),
        # the evaluator reports 0 for both when its data has no no-target expression
        **{name: torch.where((none == 0) & (some > 0), 0.0, value) for name, value in accuracy.items()},
        **{f"Pr@{level}": percent(sums["hits"][index], some) for index, level in enumerate(THRESHOLDS)},
    }
    undefined = [name for name, value in result.items() if value.isnan()]
    if undefined:
        if int(none + some) == 0:
            reason = "no expression was added"
        else:
            reason = "no expression has a target" if int(some) == 0 else "no pixel is predicted or true"
        warnings.warn(
            f"{who}: {', '.join(undefined)} would divide by zero and are NaN, because {reason}.", UserWarning, stacklevel=3
        )
    return result
