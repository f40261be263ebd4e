"""Classic referring segmentation (RefCOCO, RefCOCO+, RefCOCOg): mIoU, oIoU and Pr@X; every expression has a target."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from gresbox._checks import check_choice
from gresbox.metrics._inputs import Ids, Masks, check_masks
from gresbox.metrics._overlap import mask_overlap, rows
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["RESMetric", "res_metrics"]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
EMPTY_UNIONS = ("zero", "nan")
COLUMNS = ("expression", "intersection", "union", "iou", *(f"Pr@{level}" for level in THRESHOLDS))


class RESMetric(RecordMetric):
    r"""The metrics of referring segmentation in which every expression has a target, in percent.

    .. math:: \mathrm{mIoU} = \mathrm{mean}(I / U) \qquad \mathrm{oIoU} = \frac{\sum I}{\sum U}
        \qquad \mathrm{Pr@}X = \mathrm{mean}([I / U \ge X])

    Evaluators: that of LAVT, as DMMI's released code carries it (an empty union counts as IoU 0), and that of CARIS (it is NaN and
    makes mIoU NaN).
    Differs from them: CARIS sums in float32 and prints Pr@0.5, 0.7 and 0.9 only; sums here are float64. Tables of this field often
    say IoU: with LAVT's line of work that is oIoU, with CRIS's it is mIoU.

    Args:
        empty_union: What the IoU is where nothing is predicted and nothing is true: ``"zero"`` or ``"nan"``.
        per_sample: Keep each expression's numbers and return them too, as :func:`res_metrics` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; ``sample_ids`` ``(B,)`` integers
          or None: an id that came before, here or in another process, is not counted again.
        - :meth:`compute`: a dict of float64 scalars ``mIoU``, ``oIoU``, ``Pr@0.5`` to ``Pr@0.9``.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks are not bool.

    Example:
        >>> import torch
        >>> target = torch.ones(1, 2, 4, dtype=torch.bool)
        >>> pred = target.clone()
        >>> pred[:, :, 3] = False
        >>> metric = RESMetric()
        >>> metric.update(pred, target)
        >>> {name: float(value) for name, value in metric.compute().items() if name in ("mIoU", "Pr@0.7", "Pr@0.8")}
        {'mIoU': 75.0, 'Pr@0.7': 100.0, 'Pr@0.8': 0.0}
    """

    columns = COLUMNS
    vectors = frozenset({"intersection", "union", "iou", "sample_id"})
    marks = THRESHOLDS

    def __init__(self, *, empty_union: str = "zero", per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(per_sample=per_sample, **kwargs)
        check_choice("RESMetric", "empty_union", empty_union, EMPTY_UNIONS)
        self.empty_union = empty_union

    def update(self, pred: Masks, target: Masks, *, sample_ids: Ids | None = None) -> None:
        """Add a batch of expressions."""
        self._add("RESMetric.update", _score("RESMetric.update", pred, target, self.empty_union), sample_ids)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        return _ratios(sums)

    def _why_undefined(self, sums: Tensor) -> str:
        return _why_undefined(sums)

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)


def res_metrics(pred: Masks, target: Masks, *, empty_union: str = "zero", per_sample: bool = False) -> dict[str, Tensor]:
    """The metrics of :class:`RESMetric` of all expressions at once.

    Args:
        pred: Predicted masks.
        target: True masks, each of its prediction's size.
        empty_union: ``"zero"`` or ``"nan"``; see :class:`RESMetric`.
        per_sample: Also return each expression's ``intersection``, ``union`` and ``iou``, in [0, 1].

    Shape:
        - ``pred``, ``target``: ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool.
        - returns float64 scalars in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks are not bool.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
        >>> target = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]]], dtype=torch.bool)
        >>> scores = res_metrics(pred, target)
        >>> float(scores["mIoU"]), float(scores["oIoU"])
        (75.0, 75.0)
    """
    check_choice("res_metrics", "empty_union", empty_union, EMPTY_UNIONS)
    records = _score("res_metrics", pred, target, empty_union)
    sums = records.sum(0)
    result = _ratios(sums)
    warn_undefined("res_metrics", result, _why_undefined(sums))
    return {**result, **_samples(records)} if per_sample else result


def _score(who: str, pred: Masks, target: Masks, empty_union: str) -> Tensor:
    check_masks(who, pred, target)
    overlap = mask_overlap(pred, target)
    union = overlap.union
    with np.errstate(invalid="ignore"):
        iou = overlap.iou if empty_union == "zero" else overlap.intersection / union
    return rows([overlap.true >= 0, overlap.intersection, union, iou, *(iou >= level for level in THRESHOLDS)])


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    total = dict(zip(COLUMNS, sums, strict=True))
    return {
        "mIoU": percent(total["iou"], total["expression"]),
        "oIoU": percent(total["intersection"], total["union"]),
        **{f"Pr@{level}": percent(total[f"Pr@{level}"], total["expression"]) for level in THRESHOLDS},
    }


def _why_undefined(sums: Tensor) -> str:
    if int(sums[0]) == 0:
        return "no expression was added"
    return "no pixel is predicted or true" + ("" if int(sums[COLUMNS.index("union")]) == 0 else " in some expression")


def _samples(records: Tensor) -> dict[str, Tensor]:
    column = dict(zip(COLUMNS, records.unbind(1), strict=True))
    return {"intersection": column["intersection"].long(), "union": column["union"].long(), "iou": column["iou"]}
