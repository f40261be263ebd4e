"""Ref-ZOM: mIoU, oIoU, Acc and Pr@X, over one-to-one, one-to-many and one-to-zero expressions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gresbox._checks import check_choice
from gresbox.metrics._inputs import Ids, Masks, check_flags, check_length, check_masks
from gresbox.metrics._overlap import mask_overlap, rows
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["RefZOMMetric", "refzom_metrics"]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
KINDS = ("one", "many", "zero")
COLUMNS = (
    *KINDS,
    "right_zero",
    *(f"{name}_{kind}" for kind in ("one", "many") for name in ("intersection", "union", "iou")),
    *(f"Pr@{level}" for level in THRESHOLDS),
    "no_target",
)


class RefZOMMetric(RecordMetric):
    r"""The metrics of the Ref-ZOM benchmark, in percent.

    Over expressions with a target, one-to-one and one-to-many:

    .. math:: \mathrm{mIoU} = \mathrm{mean}(I / \max(U, 1)) \qquad \mathrm{oIoU} = \frac{\sum I}{\sum U}
        \qquad \mathrm{Pr@}X = \mathrm{mean}([I / U \ge X])

    ``Acc`` is the share of one-to-zero expressions that are answered with "nothing"; they are in no other number. ``mIoU_one``,
    ``oIoU_one``, ``mIoU_many`` and ``oIoU_many`` are the same evaluator on the subsets, as papers tabulate them.

    Paper: Hu et al., "Beyond One-to-One: Rethinking the Referring Image Segmentation", arXiv:2308.13853, and the evaluator of its
    released code (RIS-DMMI, ``test.py``).
    Differs from that code: nothing where it gives a number; where it divides by zero the value is NaN with one warning. InstanceVG
    takes ``Acc`` from its scores instead of the masks: give its flags as ``pred_no_target``; the masks are scored as they are.

    Args:
        per_sample: Keep each expression's numbers and return them too, as :func:`refzom_metrics` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; ``kind`` B strings ``"one"``,
          ``"many"``, ``"zero"``, of which the last has no target whatever its mask; ``pred_no_target`` ``(B,)`` bool or None: the
          predicted mask is empty; ``sample_ids`` ``(B,)`` integers or None: an id that came before, here or in another process,
          is not counted again.
        - :meth:`compute`: a dict of float64 scalars.

    Raises:
        ValueError: If shapes or lengths disagree or a kind is unknown.
        TypeError: If masks or flags are not bool.

    Example:
        >>> import torch
        >>> target = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> target[0, :2] = True
        >>> metric = RefZOMMetric()
        >>> metric.update(target, target, ["one", "zero"])
        >>> metric.update(target[:1], target[:1], ["many"])
        >>> {name: float(value) for name, value in metric.compute().items() if name in ("mIoU", "Acc", "oIoU_many")}
        {'mIoU': 100.0, 'Acc': 100.0, 'oIoU_many': 100.0}
    """

    columns = COLUMNS
    vectors = frozenset({"kind", "no_target", "intersection", "union", "iou", "sample_id"})
    marks = THRESHOLDS

    def __init__(self, *, per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(per_sample=per_sample, **kwargs)

    def update(
        self,
        pred: Masks,
        target: Masks,
        kind: Sequence[str],
        pred_no_target: Tensor | None = None,
        *,
        sample_ids: Ids | None = None,
    ) -> None:
        """Add a batch of expressions."""
        self._add("RefZOMMetric.update", _score("RefZOMMetric.update", pred, target, kind, pred_no_target), sample_ids)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        return _ratios(sums)

    def _why_undefined(self, sums: Tensor) -> str:
        return _why_undefined(sums)

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)


def refzom_metrics(
    pred: Masks,
    target: Masks,
    kind: Sequence[str],
    pred_no_target: Tensor | None = None,
    *,
    per_sample: bool = False,
) -> dict[str, Tensor]:
    """The metrics of :class:`RefZOMMetric` of all expressions at once.

    Args:
        pred: Predicted masks.
        target: True masks, each of its prediction's size; those of kind ``"zero"`` are not looked at.
        kind: ``"one"``, ``"many"`` or ``"zero"``.
        pred_no_target: Whether "nothing" is the answer, for ``Acc``; None: whether the predicted mask is empty.
        per_sample: Also return each expression's ``kind`` (its place in one, many, zero), ``no_target``, ``intersection``,
            ``union`` and ``iou``, in [0, 1] and NaN without a target.

    Shape:
        - ``pred``, ``target``: ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; ``kind`` B strings; flags ``(B,)`` bool.
        - returns float64 scalars in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree or a kind is unknown.
        TypeError: If masks or flags are not bool.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
        >>> target = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]], dtype=torch.bool)
        >>> scores = refzom_metrics(pred, target, ["one", "many", "zero"])
        >>> [float(scores[name]) for name in ("mIoU", "oIoU", "Acc", "mIoU_one", "mIoU_many")]
        [62.5, 62.5, 100.0, 50.0, 75.0]
    """
    records = _score("refzom_metrics", pred, target, kind, pred_no_target)
    sums = records.sum(0)
    result = _ratios(sums)
    warn_undefined("refzom_metrics", result, _why_undefined(sums))
    return {**result, **_samples(records)} if per_sample else result


def _score(who: str, pred: Masks, target: Masks, kind: Sequence[str], pred_no_target: Tensor | None) -> Tensor:
    check_masks(who, pred, target)
    check_flags(who, "pred_no_target", pred_no_target, len(pred))
    check_length(who, "kind", len(kind), len(pred), "strings as `pred` masks")
    for index, value in enumerate(kind):
        check_choice(who, f"kind[{index}]", value, KINDS)
    overlap = mask_overlap(pred, target)
    says_none = (overlap.predicted == 0) * 1.0 if pred_no_target is None else overlap.number(pred_no_target)
    is_kind = {name: overlap.number(torch.tensor([value == name for value in kind], dtype=torch.bool)) for name in KINDS}
    iou = overlap.iou * (1 - is_kind["zero"])
    columns = [*is_kind.values(), is_kind["zero"] * says_none]
    for name in ("one", "many"):
        columns += [is_kind[name] * value for value in (overlap.intersection, overlap.union, iou)]
    return rows([*columns, *(iou >= level for level in THRESHOLDS), says_none])


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    total = dict(zip(COLUMNS, sums, strict=True))
    targeted = total["one"] + total["many"]

    def both(name: str) -> Tensor:
        return total[f"{name}_one"] + total[f"{name}_many"]

    result = {
        "mIoU": percent(both("iou"), targeted),
        "oIoU": percent(both("intersection"), both("union")),
        "Acc": percent(total["right_zero"], total["zero"]),
        **{f"Pr@{level}": percent(total[f"Pr@{level}"], targeted) for level in THRESHOLDS},
    }
    for kind in ("one", "many"):
        result[f"mIoU_{kind}"] = percent(total[f"iou_{kind}"], total[kind])
        result[f"oIoU_{kind}"] = percent(total[f"intersection_{kind}"], total[f"union_{kind}"])
    return result


def _why_undefined(sums: Tensor) -> str:
    missing = [f"'{kind}'" for kind, count in zip(KINDS, sums, strict=False) if int(count) == 0]
    if len(missing) == len(KINDS):
        return "no expression was added"
    return f"no expression is of kind {' or '.join(missing)}" if missing else "no pixel is predicted or true"


def _samples(records: Tensor) -> dict[str, Tensor]:
    column = dict(zip(COLUMNS, records.unbind(1), strict=True))
    both = {name: column[f"{name}_one"] + column[f"{name}_many"] for name in ("intersection", "union", "iou")}
    return {
        "kind": (column["many"] + 2 * column["zero"]).long(),
        "no_target": column["no_target"].bool(),
        "intersection": both["intersection"].long(),
        "union": both["union"].long(),
        "iou": both["iou"].masked_fill(column["zero"].bool(), torch.nan),
    }
