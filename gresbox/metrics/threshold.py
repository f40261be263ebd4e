"""Metrics as functions of the threshold that decides "nothing": curves, AUROC, average precision, and a threshold to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gresbox._checks import check_range, check_shape
from gresbox.metrics._inputs import Ids, Masks, check_flags, check_masks, check_numbers
from gresbox.metrics._overlap import mask_overlap, rows
from gresbox.metrics._plot import draw_curves, figure_of, new_axes
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ThresholdSweep", "sweep_thresholds"]

COLUMNS = ("score", "target_no_target", "intersection", "union", "iou")
CURVES = ("gIoU", "cIoU", "N_acc", "T_acc", "F1")
SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)
Thresholds = Tensor | Sequence[float] | None


class ThresholdSweep(RecordMetric):
    r"""What the no-target threshold does, from one pass over a data set.

    An expression is answered with "nothing" where its no-target score lies above the threshold :math:`t`. The curves are what
    :class:`gresbox.metrics.GRESMetric` gives for these answers, at every :math:`t` at once, and the F1 of the decision itself, in
    which "nothing" is the positive class:

    .. math:: F_1(t) = \frac{2\,TP}{2\,TP + FP + FN}, \quad TP = |\{s > t\} \cap Z|, \; FP = |\{s > t\} \setminus Z|, \;
        FN = |Z \setminus \{s > t\}|

    AUROC and AP (the sum of precision times the step of recall, equal scores together) judge the score without any threshold.
    Everything is exact: the scores are kept, a few numbers per expression, and sorted once.

    Paper: none; gIoU, cIoU, N_acc and T_acc are those of gRefCOCO's evaluator.
    Differs from that evaluator: without no-target expressions ``N_acc`` is NaN and ``T_acc`` still counts, where it has 0 for both.

    Args:
        thresholds: Where the curves are read; None: 0, 0.01, ..., 1.
        per_sample: Also return each expression's score, flag and overlap, as :func:`sweep_thresholds` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``pred``, ``target`` ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool, the masks as predicted, not
          emptied by a decision; ``no_target_scores`` ``(B,)`` in [0, 1]; ``target_no_target`` ``(B,)`` bool or None: the true mask
          is empty; ``sample_ids`` ``(B,)`` integers or None: an id that came before, here or in another process, is not counted
          again.
        - :meth:`compute`: a dict of float64: ``threshold``, ``gIoU``, ``cIoU``, ``N_acc``, ``T_acc``, ``F1`` ``(T,)``; scalars
          ``AUROC``, ``AP``, ``no_target_share``, ``samples``. All but the thresholds and ``samples`` are in percent.

    Raises:
        ValueError: If shapes or lengths disagree, or a score or threshold is NaN or outside [0, 1].
        TypeError: If masks or flags are not bool or scores not floating-point.

    Example:
        >>> import torch
        >>> target = torch.zeros(4, 2, 2, dtype=torch.bool)
        >>> target[:2] = True
        >>> sweep = ThresholdSweep()
        >>> sweep.update(torch.ones_like(target), target, torch.tensor([0.1, 0.6, 0.4, 0.9]))
        >>> print(sweep.summary([0.2, 0.5]))
        4 expressions, 50.0 % without a target; AUROC 75.0, AP 83.3
        threshold    gIoU    cIoU   N_acc   T_acc      F1
             0.20    75.0    50.0   100.0    50.0    80.0
             0.50    50.0    33.3    50.0    50.0    50.0
        >>> sweep.threshold_for(t_acc=100)["threshold"]
        tensor(0.6000, dtype=torch.float64)
    """

    columns = COLUMNS
    keeps_rows = True
    vectors = frozenset({"threshold", *CURVES, "score", "target_no_target", "intersection", "union", "iou", "sample_id"})

    def __init__(self, thresholds: Thresholds = None, *, per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(per_sample=per_sample, **kwargs)
        self.thresholds = _checked_thresholds("ThresholdSweep", thresholds)

    def update(
        self,
        pred: Masks,
        target: Masks,
        no_target_scores: Tensor,
        target_no_target: Tensor | None = None,
        *,
        sample_ids: Ids | None = None,
    ) -> None:
        """Add a batch of expressions; waits for the device once, to check the scores."""
        who = "ThresholdSweep.update"
        self._add(who, _score(who, pred, target, no_target_scores, target_no_target), sample_ids)

    def compute(self) -> dict[str, Tensor]:
        """The curves and scalars of everything added so far."""
        records, keys = self._kept()
        result = _sweep(records, self.thresholds)
        if self.update_called:  # else torchmetrics warns
            warn_undefined(f"{type(self).__name__}.compute", result, _why_undefined(records))
        return {**result, **self._listed(records, keys)}

    def threshold_for(self, t_acc: float) -> dict[str, Tensor]:
        """The lowest threshold that answers at least this share of the targeted expressions, and the metrics there.

        The lowest one, because N_acc only falls as the threshold rises. It is 0 or one of the scores, so it is exact.

        Args:
            t_acc: The wished T_acc in percent.

        Raises:
            ValueError: If it is not in [0, 100] or no targeted expression was added.
        """
        who = f"{type(self).__name__}.threshold_for"
        check_range(who, "t_acc", t_acc, 0, 100)
        records = self._gathered()
        if not bool((records[:, 1] == 0).any()):
            raise ValueError(f"{who}: `update` must have added an expression with a target, got none.")
        steps = torch.cat([records.new_zeros(1), records[:, 0]]).unique()
        curves = _curves(records, steps)
        place = int((curves["T_acc"] >= t_acc).nonzero()[0])
        return {"threshold": steps[place], **{name: values[place] for name, values in curves.items()}}

    def summary(self, thresholds: Sequence[float] = SHOWN) -> str:
        """A table to print: how many expressions, the share without a target, AUROC, AP, and a line per threshold.

        Args:
            thresholds: The lines.

        Raises:
            ValueError: If one is NaN or outside [0, 1].
        """
        levels = _checked_thresholds(f"{type(self).__name__}.summary", thresholds)
        result = self.compute()
        records = self._gathered()
        curves = _curves(records, levels.to(records.device))
        lines = [_title(result) + f"; AUROC {float(result['AUROC']):.1f}, AP {float(result['AP']):.1f}"]
        lines.append("threshold" + "".join(f"{name:>8}" for name in CURVES))
        for place, level in enumerate(levels.tolist()):
            lines.append(f"{level:9.2f}" + "".join(f"{float(curves[name][place]):8.1f}" for name in CURVES))
        return "\n".join(lines)

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Sequence[Axes]]:
        """The curves over the threshold; the title says how many expressions there are and the share without a target.

        Args:
            val: A result of :meth:`compute` or several to compare, the later ones paler; None: of everything added so far.
            ax: Where to draw; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        results = [self.compute()] if val is None else [val] if isinstance(val, dict) else list(val)
        axes = [ax] if ax is not None else new_axes(type(self).__name__, 1, 4.0)
        title = f"{_title(results[0])}\nAUROC {float(results[0]['AUROC']):.1f}, AP {float(results[0]['AP']):.1f}"
        draw_curves(axes[0], results, CURVES, title)
        return figure_of(axes[0]), axes

    def _gathered(self) -> Tensor:
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._kept()[0]

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)


def sweep_thresholds(
    pred: Masks,
    target: Masks,
    no_target_scores: Tensor,
    target_no_target: Tensor | None = None,
    *,
    thresholds: Thresholds = None,
    per_sample: bool = False,
) -> dict[str, Tensor]:
    """The curves and scalars of :class:`ThresholdSweep` of all expressions at once.

    Args:
        pred: Predicted masks, not emptied by a decision.
        target: True masks, each of its prediction's size.
        no_target_scores: The probability of "nothing".
        target_no_target: Whether "nothing" is the truth; None: whether the true mask is empty.
        thresholds: Where the curves are read; None: 0, 0.01, ..., 1.
        per_sample: Also return each expression's ``score``, ``target_no_target``, ``intersection``, ``union`` and ``iou``, in
            [0, 1], before any decision.

    Shape:
        - ``pred``, ``target``: ``(B, H, W)`` bool or lists of ``(H_i, W_i)`` bool; scores ``(B,)`` in [0, 1]; flags ``(B,)`` bool.
        - returns float64 ``(T,)`` curves and scalars, see :class:`ThresholdSweep`; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree, or a score or threshold is NaN or outside [0, 1].
        TypeError: If masks or flags are not bool or scores not floating-point.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[1, 1]], [[0, 0]]], dtype=torch.bool)
        >>> result = sweep_thresholds(target, target, torch.tensor([0.2, 0.8]), thresholds=[0.1, 0.5])
        >>> result["T_acc"], float(result["AUROC"]), float(result["no_target_share"])
        (tensor([  0., 100.], dtype=torch.float64), 100.0, 50.0)
    """
    levels = _checked_thresholds("sweep_thresholds", thresholds)
    records = _score("sweep_thresholds", pred, target, no_target_scores, target_no_target)
    result = _sweep(records, levels)
    warn_undefined("sweep_thresholds", result, _why_undefined(records))
    return {**result, **_samples(records)} if per_sample else result


def _checked_thresholds(who: str, thresholds: Thresholds) -> Tensor:
    if thresholds is None:
        return torch.arange(101, dtype=torch.float64) / 100
    levels = torch.as_tensor(thresholds, dtype=torch.float64).detach().cpu()
    check_shape(who, thresholds=(levels, "T"))
    check_numbers(who, "thresholds", levels, 0, 1)
    return levels


def _score(who: str, pred: Masks, target: Masks, scores: Tensor, target_no_target: Tensor | None) -> Tensor:
    check_masks(who, pred, target)
    check_flags(who, "target_no_target", target_no_target, len(pred))
    size = check_shape(who, no_target_scores=(scores, "B"))["B"]
    if size != len(pred):
        raise ValueError(f"{who}: `no_target_scores` must be (B,) with B={len(pred)}, got ({size},).")
    check_numbers(who, "no_target_scores", scores, 0, 1)
    overlap = mask_overlap(pred, target)
    is_none = overlap.true == 0 if target_no_target is None else overlap.number(target_no_target)
    return rows([overlap.number(scores.detach().double()), is_none, overlap.intersection, overlap.union, overlap.iou])


def _sweep(records: Tensor, thresholds: Tensor) -> dict[str, Tensor]:
    levels = thresholds.to(records.device)
    is_none = records[:, 1]
    count = torch.ones_like(is_none).sum()
    return {
        "threshold": levels,
        **_curves(records, levels),
        **_ranking(records),
        "no_target_share": percent(is_none.sum(), count),
        "samples": count,
    }


def _curves(records: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """The metrics at each threshold: sums over the expressions whose score is at most that, the ones answered with something."""
    score, is_none, intersection, union, iou = records[records[:, 0].argsort()].unbind(1)
    place = torch.searchsorted(score.contiguous(), levels.contiguous(), right=True)

    def answered(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(1), values.cumsum(0)])[place]

    some, none = (1 - is_none).sum(), is_none.sum()
    right_some, missed_none = answered(1 - is_none), answered(is_none)
    right_none, missed_some = none - missed_none, some - right_some
    total_union = ((1 - is_none) * union).sum() + answered(is_none * union)
    return {
        "gIoU": percent(answered((1 - is_none) * iou) + right_none, none + some),
        "cIoU": percent(answered((1 - is_none) * intersection), total_union),
        "N_acc": percent(right_none, none),
        "T_acc": percent(right_some, some),
        "F1": percent(2 * right_none, 2 * right_none + missed_some + missed_none),
    }


def _ranking(records: Tensor) -> dict[str, Tensor]:
    """AUROC and average precision of the score; expressions with equal scores stand at the same place."""
    score, is_none = records[:, 0], records[:, 1]
    steps, place = torch.unique(score, return_inverse=True)
    positives, everyone = (torch.zeros_like(steps).index_add(0, place, values) for values in (is_none, torch.ones_like(is_none)))
    negatives = everyone - positives
    below = negatives.cumsum(0) - negatives  # with a smaller score
    pairs = (positives * (below + negatives / 2)).sum()
    above = positives.flip(0).cumsum(0), everyone.flip(0).cumsum(0)
    precision = above[0] / above[1]
    return {
        "AUROC": percent(pairs, positives.sum() * negatives.sum()),
        "AP": percent((positives.flip(0) * precision).sum(), positives.sum()),
    }


def _why_undefined(records: Tensor) -> str:
    if len(records) == 0:
        return "no expression was added"
    return "no expression has a target" if bool((records[:, 1] == 1).all()) else "every expression has a target"


def _title(result: Mapping[str, Tensor]) -> str:
    return f"{int(result['samples'])} expressions, {float(result['no_target_share']):.1f} % without a target"


def _samples(records: Tensor) -> dict[str, Tensor]:
    score, is_none, intersection, union, iou = records.unbind(1)
    return {
        "score": score,
        "target_no_target": is_none.bool(),
        "intersection": intersection.long(),
        "union": union.long(),
        "iou": iou,
    }
