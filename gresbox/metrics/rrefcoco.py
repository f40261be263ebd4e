"""R-RefCOCO, R-RefCOCO+ and R-RefCOCOg: mIoU, oIoU, mRR and rIoU over groups of true and false sentences about one object."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gresbox._checks import check_choice
from gresbox.metrics._inputs import Ids, Masks, check_flags, check_masks, integers
from gresbox.metrics._overlap import mask_overlap, rows
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["RRefCOCOMetric", "rrefcoco_metrics"]

PROTOCOLS = ("robust_ref_seg", "instancevg")
COLUMNS = ("exists", "no_target", "intersection", "union", "predicted")


class RRefCOCOMetric(RecordMetric):
    r"""The metrics of the R-RefCOCO benchmarks, in percent.

    A group holds the sentences about one object: positive ones, which are true of the picture, and negative ones, which are not.
    With :math:`s` over the positive and :math:`n` over the negative sentences of a group :math:`g`, :math:`R_n` whether a negative
    sentence is answered with "nothing", and :math:`|m_n|` its predicted pixels if it is not:

    .. math:: \mathrm{mIoU} = \mathrm{mean}_g \, \mathrm{mean}_s (I_s / U_s)
        \qquad \mathrm{mRR} = \mathrm{mean}_g \, \mathrm{mean}_n R_n
        \qquad \mathrm{rIoU} = \mathrm{mean}_g \frac{\sum_s I_s}{\sum_s U_s + \sum_n |m_n|}
        \qquad \mathrm{oIoU} = \frac{\sum_{g, s} I_s}{\sum_{g, s} U_s}

    The first three are means over groups, not over sentences.

    Paper: Wu et al., "Towards Robust Referring Image Segmentation", arXiv:2209.09554, and the evaluator of its released code
    (robust-ref-seg, ``utils/validation.py``).
    Differs from that code: sums are float64 where it has float32. Its precision is left out: it compares a running sum of IoUs, so
    a group with several positive sentences passes every threshold. As there, a positive sentence with an empty union, and a group
    without positive or without negative sentences, make the means NaN.

    Args:
        protocol: What ``pred_no_target`` does. ``"robust_ref_seg"``: it empties the mask, of positive sentences too, and a negative
            sentence is answered with "nothing" where its mask is then empty. ``"instancevg"``: masks are scored as they are, and
            only the flag says which negative sentences are answered with "nothing".
        per_sample: Keep each sentence's numbers and return them too, as :func:`rrefcoco_metrics` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool, one per sentence; ``exists``
          ``(B,)`` bool, True where the sentence is true of the picture, else its target is not looked at; ``group`` ``(B,)``
          integers, any numbers, and a group's sentences may come in any batch and process; ``pred_no_target`` ``(B,)`` bool or
          None: the predicted mask is empty; ``sample_ids`` ``(B,)`` integers or None: an id that came before, here or in another
          process, is not counted again.
        - :meth:`compute`: a dict of float64 scalars ``mIoU``, ``oIoU``, ``mRR``, ``rIoU``.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks or flags are not bool or groups not integers.

    Example:
        >>> import torch
        >>> target = torch.ones(2, 2, 4, dtype=torch.bool)
        >>> pred = target.clone()
        >>> pred[1, :, 2:] = False  # half of the picture, although the second sentence is false
        >>> metric = RRefCOCOMetric()
        >>> metric.update(pred, target, exists=torch.tensor([True, False]), group=torch.tensor([7, 7]))
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
        {'mIoU': 100.0, 'oIoU': 100.0, 'mRR': 0.0, 'rIoU': 66.67}
    """

    columns = COLUMNS
    keeps_rows = True
    vectors = frozenset({"group", "exists", "no_target", "intersection", "union", "iou", "predicted", "sample_id"})

    def __init__(self, *, protocol: str = "robust_ref_seg", per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(per_sample=per_sample, **kwargs)
        check_choice("RRefCOCOMetric", "protocol", protocol, PROTOCOLS)
        self.protocol = protocol

    def update(
        self,
        pred: Masks,
        target: Masks,
        exists: Tensor,
        group: Ids,
        pred_no_target: Tensor | None = None,
        *,
        sample_ids: Ids | None = None,
    ) -> None:
        """Add a batch of sentences."""
        who = "RRefCOCOMetric.update"
        records = _score(who, pred, target, exists, pred_no_target, self.protocol)
        self._add(who, records, sample_ids, integers(who, "group", group, len(pred)))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything added so far, in percent; with ``per_sample`` also each sentence's numbers."""
        records, keys = self._kept()
        totals = _totals(records, keys[:, 2])
        result = _ratios(totals)
        if self.update_called:  # else torchmetrics warns
            warn_undefined(f"{type(self).__name__}.compute", result, _why_undefined(totals))
        listed = self._listed(records, keys)
        return {**result, **listed, **({"group": keys[:, 2]} if listed else {})}

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)

    def _reached(self, result: Mapping[str, Tensor]) -> Tensor | None:
        return result["iou"][result["exists"]] if "iou" in result else None


def rrefcoco_metrics(
    pred: Masks,
    target: Masks,
    exists: Tensor,
    group: Ids,
    pred_no_target: Tensor | None = None,
    *,
    protocol: str = "robust_ref_seg",
    per_sample: bool = False,
) -> dict[str, Tensor]:
    """The metrics of :class:`RRefCOCOMetric` of all sentences at once.

    Args:
        pred: Predicted masks.
        target: True masks, each of its prediction's size; those of false sentences are not looked at.
        exists: Whether the sentence is true of the picture.
        group: Which object the sentence is about; any numbers.
        pred_no_target: Whether "nothing" is the answer; None: whether the predicted mask is empty.
        protocol: ``"robust_ref_seg"`` or ``"instancevg"``; see :class:`RRefCOCOMetric`.
        per_sample: Also return each sentence's ``exists``, ``group``, ``no_target``, ``intersection``, ``union``, ``iou`` (in
            [0, 1]; NaN where the sentence is false) and ``predicted`` (pixels), as they enter the sums.

    Shape:
        - ``pred``, ``target``: ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; flags ``(B,)`` bool; groups ``(B,)`` integers.
        - returns float64 scalars in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree or an option is unknown.
        TypeError: If masks or flags are not bool or groups not integers.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
        >>> truth = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]]], dtype=torch.bool)
        >>> scores = rrefcoco_metrics(masks, truth, torch.tensor([True, False]), [1, 1])
        >>> float(scores["mIoU"]), float(scores["mRR"])
        (50.0, 100.0)
    """
    who = "rrefcoco_metrics"
    check_choice(who, "protocol", protocol, PROTOCOLS)
    records = _score(who, pred, target, exists, pred_no_target, protocol)
    groups = integers(who, "group", group, len(pred)).to(records.device)
    totals = _totals(records, groups)
    result = _ratios(totals)
    warn_undefined(who, result, _why_undefined(totals))
    return {**result, **_samples(records), "group": groups} if per_sample else result


def _score(who: str, pred: Masks, target: Masks, exists: Tensor, pred_no_target: Tensor | None, protocol: str) -> Tensor:
    check_masks(who, pred, target)
    if exists is None:
        raise TypeError(f"{who}: `exists` must be a bool tensor, got NoneType.")
    check_flags(who, "exists", exists, len(pred))
    check_flags(who, "pred_no_target", pred_no_target, len(pred))
    overlap = mask_overlap(pred, target)
    says_none = (overlap.predicted == 0) * 1.0 if pred_no_target is None else overlap.number(pred_no_target)
    if protocol == "robust_ref_seg":
        overlap = overlap.emptied(says_none)
        says_none = overlap.predicted == 0
    true = overlap.number(exists)
    return rows([true, says_none, true * overlap.intersection, true * overlap.union, overlap.predicted])


def _totals(records: Tensor, group: Tensor) -> dict[str, Tensor]:
    """Each group's sums, ``(G,)``."""
    exists, says_none, intersection, union, predicted = records.unbind(1)
    false = 1 - exists
    columns = {
        "positives": exists,
        "iou": torch.where(exists == 1, intersection / union, 0.0),  # NaN where a true sentence's union is empty, as there
        "intersection": intersection,
        "union": union,
        "negatives": false,
        "rejected": false * says_none,
        "wrong_pixels": false * (1 - says_none) * predicted,
    }
    groups, place = torch.unique(group, return_inverse=True)
    return {name: torch.zeros_like(exists[:1]).expand(len(groups)).index_add(0, place, value) for name, value in columns.items()}


def _ratios(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups = torch.ones_like(totals["iou"]).sum()
    robust = totals["intersection"] / (totals["union"] + totals["wrong_pixels"])
    return {
        "mIoU": percent((totals["iou"] / totals["positives"]).sum(), groups),
        "oIoU": percent(totals["intersection"].sum(), totals["union"].sum()),
        "mRR": percent((totals["rejected"] / totals["negatives"]).sum(), groups),
        "rIoU": percent(robust.sum(), groups),
    }


def _why_undefined(totals: Mapping[str, Tensor]) -> str:
    if len(totals["iou"]) == 0:
        return "no sentence was added"
    reasons = [
        f"{count} of {len(totals['iou'])} groups have no {what}"
        for what, count in (
            ("true sentence", int((totals["positives"] == 0).sum())),
            ("false sentence", int((totals["negatives"] == 0).sum())),
            ("predicted or true pixel in a true sentence", int(totals["iou"].isnan().sum())),
        )
        if count
    ]
    return " and ".join(reasons) or "no pixel is predicted or true"


def _samples(records: Tensor) -> dict[str, Tensor]:
    exists, says_none, intersection, union, predicted = records.unbind(1)
    return {
        "exists": exists.bool(),
        "no_target": says_none.bool(),
        "intersection": intersection.long(),
        "union": union.long(),
        "iou": torch.where(exists == 1, intersection / union, torch.nan),
        "predicted": predicted.long(),
    }
