"""gRefCOCO: gIoU, cIoU, N_acc, T_acc and Pr@X as the benchmark's own evaluator defines them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gresbox._checks import check_choice, check_range
from gresbox.metrics._inputs import Ids, Masks, check_flags, check_masks
from gresbox.metrics._overlap import mask_overlap, rows
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["GRESMetric", "gres_metrics"]

THRESHOLDS = (0.7, 0.8, 0.9)
RULES = ("empty_mask", "pixels")
COLUMNS = (
    "expression",
    "no_target",
    "target_no_target",
    "right_none",
    "right_some",
    "intersection",
    "union",
    "iou",
    *(f"Pr@{level}" for level in THRESHOLDS),
)


class GRESMetric(RecordMetric):
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
        per_sample: Keep each expression's numbers and return them too, as :func:`gres_metrics` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; ``pred_no_target``,
          ``target_no_target`` ``(B,)`` bool or None. None for the target means: its mask is empty. ``sample_ids`` ``(B,)``
          integers or None: an id that came before, here or in another process, is not counted again.
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

    columns = COLUMNS
    vectors = frozenset({"no_target", "target_no_target", "intersection", "union", "iou", "sample_id"})
    marks = THRESHOLDS

    def __init__(
        self, *, no_target_rule: str = "empty_mask", min_pixels: int = 50, per_sample: bool = False, **kwargs: object
    ) -> None:
        super().__init__(per_sample=per_sample, **kwargs)
        _check_options("GRESMetric", no_target_rule, min_pixels)
        self.no_target_rule = no_target_rule
        self.min_pixels = min_pixels

    def update(
        self,
        pred: Masks,
        target: Masks,
        pred_no_target: Tensor | None = None,
        target_no_target: Tensor | None = None,
        *,
        sample_ids: Ids | None = None,
    ) -> None:
        """Add a batch of expressions."""
        least = _least_pixels(self.no_target_rule, self.min_pixels)
        records = _score("GRESMetric.update", pred, target, pred_no_target, target_no_target, least)
        self._add("GRESMetric.update", records, sample_ids)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        return _ratios(sums)

    def _why_undefined(self, sums: Tensor) -> str:
        return _why_undefined(sums)

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)

    def _reached(self, result: Mapping[str, Tensor]) -> Tensor | None:
        return result["iou"][~result["target_no_target"]] if "iou" in result else None


def gres_metrics(
    pred: Masks,
    target: Masks,
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
        per_sample: Also return each expression's ``no_target`` (the prediction), ``target_no_target``, ``intersection``,
            ``union`` and ``iou`` as they enter the sums; ``iou`` in [0, 1].

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
    least = _least_pixels(no_target_rule, min_pixels)
    records = _score("gres_metrics", pred, target, pred_no_target, target_no_target, least)
    sums = records.sum(0)
    result = _ratios(sums)
    warn_undefined("gres_metrics", result, _why_undefined(sums))
    return {**result, **_samples(records)} if per_sample else result


def _check_options(who: str, rule: str, min_pixels: int) -> None:
    check_choice(who, "no_target_rule", rule, RULES)
    check_range(who, "min_pixels", min_pixels, low=1)


def _least_pixels(rule: str, min_pixels: int) -> int:
    return min_pixels if rule == "pixels" else 1


def _score(
    who: str,
    pred: Masks,
    target: Masks,
    pred_no_target: Tensor | None,
    target_no_target: Tensor | None,
    least_pixels: int,
) -> Tensor:
    """Each expression's row of the evaluator's truth table."""
    check_masks(who, pred, target)
    check_flags(who, "pred_no_target", pred_no_target, len(pred))
    check_flags(who, "target_no_target", target_no_target, len(pred))
    overlap = mask_overlap(pred, target)
    if pred_no_target is None:
        says_none = (overlap.predicted < least_pixels) * 1.0
        overlap = overlap.emptied(says_none)
    else:
        says_none = overlap.number(pred_no_target)
    is_none = (overlap.true == 0) * 1.0 if target_no_target is None else overlap.number(target_no_target)
    right_none, right_some = is_none * says_none, (1 - is_none) * (1 - says_none)
    overlapping = right_some * overlap.iou
    columns = [overlap.true >= 0, says_none, is_none, right_none, right_some]
    columns += [right_some * overlap.intersection, (1 - right_none) * overlap.union, right_none + overlapping]
    columns += [overlapping >= level for level in THRESHOLDS]  # in float64: a float32 0.7 would let 0.6999999 pass
    return rows(columns)


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    total = dict(zip(COLUMNS, sums, strict=True))
    none = total["target_no_target"]
    some = total["expression"] - none
    accuracy = {"N_acc": percent(total["right_none"], none), "T_acc": percent(total["right_some"], some)}
    return {
        "gIoU": percent(total["iou"], total["expression"]),
        "cIoU": percent(total["intersection"], total["union"]),
        # the evaluator reports 0 for both when its data has no no-target expression
        **{name: torch.where((none == 0) & (some > 0), 0.0, value) for name, value in accuracy.items()},
        **{f"Pr@{level}": percent(total[f"Pr@{level}"], some) for level in THRESHOLDS},
    }


def _why_undefined(sums: Tensor) -> str:
    expressions, none = int(sums[0]), int(sums[COLUMNS.index("target_no_target")])
    if expressions == 0:
        return "no expression was added"
    return "no expression has a target" if expressions == none else "no pixel is predicted or true"


def _samples(records: Tensor) -> dict[str, Tensor]:
    column = dict(zip(COLUMNS, records.unbind(1), strict=True))
    return {
        "no_target": column["no_target"].bool(),
        "target_no_target": column["target_no_target"].bool(),
        "intersection": column["intersection"].long(),
        "union": column["union"].long(),
        "iou": column["iou"],
    }
