"""GREC, detection on gRefCOCO: F1 (the share of expressions whose boxes are all right), N_acc and T_acc."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gresbox._checks import check_choice, check_float, check_range, check_shape
from gresbox.metrics._inputs import Ids, check_flags, check_length
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["GRECMetric", "grec_metrics"]

IOU_TYPES = ("giou", "iou")
PROTOCOLS = ("grefcoco", "instancevg")
COLUMNS = ("expression", "target_no_target", "right", "right_none", "right_some", "kept", "matched", "f1")
Prediction = Mapping[str, Tensor]


class GRECMetric(RecordMetric):
    r"""The metrics of generalised referring expression comprehension on gRefCOCO, in percent.

    Boxes with a score of at least ``score_threshold`` are kept. The best pair of a kept and a true box is matched, again and again,
    while its overlap is at least ``overlap_threshold``. An expression is right if every kept and every true box is matched:

    .. math:: F_1 = \frac{2\,TP}{2\,TP + FP + FN} \qquad \mathrm{F1} = \mathrm{mean}([F_1 \ge 1])

    over all expressions; one without a target is right if no box is kept. ``N_acc`` and ``T_acc`` are the shares of no-target
    expressions without, and of targeted expressions with, at least one kept box.

    Paper: He et al., "GREC: Generalized Referring Expression Comprehension", arXiv:2308.16182, and the evaluator of its released
    code (gRefCOCO, ``mdetr/datasets/refexp.py``).
    Differs from that code: percent instead of fractions; no box at all is allowed; a pair of boxes without area has overlap 0 where
    that has NaN. The paper says IoU, its code takes generalised IoU: so does the default. Where the code divides by zero the value
    is NaN with one warning, or 0 with ``protocol="instancevg"``.

    Args:
        score_threshold: Boxes with at least this score are kept; compared in float64, as there, where a float32 0.7 is below 0.7.
        iou_type: ``"giou"``, as the code, or ``"iou"``, as the paper.
        overlap_threshold: A matched pair has at least this overlap.
        protocol: ``"grefcoco"`` or ``"instancevg"``, whose ``N_acc`` and ``T_acc`` are 0 where there is nothing to count.
        per_sample: Keep each expression's numbers and return them too, as :func:`grec_metrics` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``predictions`` B dicts with ``boxes_xyxy`` ``(N_i, 4)``, in any unit, and ``scores`` ``(N_i,)``;
          ``targets`` B tensors ``(M_i, 4)`` xyxy in that unit; ``target_no_target`` ``(B,)`` bool or None: there is no true box.
          ``sample_ids`` ``(B,)`` integers or None: an id that came before, here or in another process, is not counted again.
        - :meth:`compute`: a dict of float64 scalars ``F1``, ``N_acc``, ``T_acc``.

    Raises:
        ValueError: If shapes or lengths disagree, a score is NaN, or a kept or true box is not finite or ends before it begins.
        TypeError: If a prediction is not such a dict or a tensor is not floating-point.

    Example:
        >>> import torch
        >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> metric = GRECMetric()
        >>> metric.update([{"boxes_xyxy": box, "scores": torch.tensor([0.9])}] * 2, [box, box[:0]])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'F1': 50.0, 'N_acc': 0.0, 'T_acc': 100.0}
    """

    columns = COLUMNS
    vectors = frozenset({"kept", "matched", "f1", "sample_id"})

    def __init__(
        self,
        score_threshold: float = 0.7,
        iou_type: str = "giou",
        *,
        overlap_threshold: float = 0.5,
        protocol: str = "grefcoco",
        per_sample: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(per_sample=per_sample, **kwargs)
        self._rule = _checked_rule("GRECMetric", score_threshold, iou_type, overlap_threshold, protocol)
        self.score_threshold, self.iou_type = score_threshold, iou_type
        self.overlap_threshold, self.protocol = overlap_threshold, protocol

    def update(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Tensor],
        target_no_target: Tensor | None = None,
        *,
        sample_ids: Ids | None = None,
    ) -> None:
        """Add a batch of expressions; boxes that are on a device are brought to the CPU."""
        who = "GRECMetric.update"
        self._add(who, _score(who, predictions, targets, target_no_target, self._rule, self.per_sample), sample_ids)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        return _ratios(sums, self.protocol)

    def _why_undefined(self, sums: Tensor) -> str:
        return _why_undefined(sums)

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)


def grec_metrics(
    predictions: Sequence[Prediction],
    targets: Sequence[Tensor],
    target_no_target: Tensor | None = None,
    *,
    score_threshold: float = 0.7,
    iou_type: str = "giou",
    overlap_threshold: float = 0.5,
    protocol: str = "grefcoco",
    per_sample: bool = False,
) -> dict[str, Tensor]:
    """The metrics of :class:`GRECMetric` of all expressions at once.

    Args:
        predictions: Each expression's boxes and scores.
        targets: Each expression's true boxes.
        target_no_target: Whether "nothing" is the truth; None: whether there is no true box.
        score_threshold: Boxes with at least this score are kept.
        iou_type: ``"giou"`` or ``"iou"``; see :class:`GRECMetric`.
        overlap_threshold: A matched pair has at least this overlap.
        protocol: ``"grefcoco"`` or ``"instancevg"``; see :class:`GRECMetric`.
        per_sample: Also return each expression's numbers of ``kept`` and ``matched`` boxes and its ``f1``, in [0, 1].

    Shape:
        - ``predictions``: B dicts with ``boxes_xyxy`` ``(N_i, 4)`` and ``scores`` ``(N_i,)``; ``targets``: B tensors ``(M_i, 4)``
          xyxy; ``target_no_target``: ``(B,)`` bool.
        - returns float64 scalars in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree, a score is NaN, or a kept or true box is not finite or ends before it begins.
        TypeError: If a prediction is not such a dict or a tensor is not floating-point.

    Example:
        >>> import torch
        >>> truth = torch.tensor([[0.0, 0.0, 4.0, 4.0], [6.0, 6.0, 8.0, 8.0]])
        >>> found = {"boxes_xyxy": truth[:1], "scores": torch.tensor([0.9])}
        >>> scores = grec_metrics([found], [truth], protocol="instancevg", per_sample=True)
        >>> float(scores["F1"]), round(float(scores["f1"]), 3)
        (0.0, 0.667)
    """
    rule = _checked_rule("grec_metrics", score_threshold, iou_type, overlap_threshold, protocol)
    records = _score("grec_metrics", predictions, targets, target_no_target, rule, per_sample)
    sums = records.sum(0)
    result = _ratios(sums, protocol)
    warn_undefined("grec_metrics", result, _why_undefined(sums))
    return {**result, **_samples(records)} if per_sample else result


class _Rule(NamedTuple):
    score_threshold: float
    iou_type: str
    overlap_threshold: float


class _Boxes(NamedTuple):
    """Boxes of a batch: rows of one array, those of an expression next to each other."""

    xyxy: np.ndarray  # (rows, 4), float32, as the evaluator computes, or float64
    starts: list[int]  # the row where each expression's boxes begin, and the end of the last: B + 1 numbers

    @property
    def counts(self) -> list[int]:
        """Boxes of each expression."""
        return [end - start for start, end in pairwise(self.starts)]

    def corners(self, chosen: list[int]) -> np.ndarray:
        """Those of the chosen expressions, (low or high, x or y, chosen, most boxes), NaN where one has fewer."""
        spans = [(self.starts[index], self.starts[index + 1]) for index in chosen]
        padded = np.full((4, len(spans), max(end - start for start, end in spans)), np.nan, self.xyxy.dtype)
        for place, (start, end) in enumerate(spans):
            padded[:, place, : end - start] = self.xyxy[start:end].T
        return padded.reshape(2, 2, *padded.shape[1:])


def _checked_rule(who: str, score_threshold: float, iou_type: str, overlap_threshold: float, protocol: str) -> _Rule:
    check_range(who, "score_threshold", score_threshold)
    check_choice(who, "iou_type", iou_type, IOU_TYPES)
    check_range(who, "overlap_threshold", overlap_threshold, -1, 1)
    check_choice(who, "protocol", protocol, PROTOCOLS)
    return _Rule(score_threshold, iou_type, overlap_threshold)


def _score(
    who: str,
    predictions: Sequence[Prediction],
    targets: Sequence[Tensor],
    target_no_target: Tensor | None,
    rule: _Rule,
    every_match: bool,
) -> Tensor:
    check_length(who, "targets", len(targets), len(predictions), "tensors as `predictions`")
    check_flags(who, "target_no_target", target_no_target, len(targets))
    kept, scores, true = _gathered(who, predictions, targets, rule.score_threshold)
    is_none = [count == 0 for count in true.counts] if target_no_target is None else target_no_target.tolist()
    numbers = list(zip(kept.counts, true.counts, is_none, strict=True))
    # different numbers of boxes cannot all be matched, so nobody needs to know how many are, unless each F1 is asked for
    chosen = [i for i, (n, m, none) in enumerate(numbers) if not none and n and m and (every_match or n == m)]
    matched = _count_matches(kept, scores, true, chosen, rule)
    records = []
    for (n, m, none), pairs in zip(numbers, matched, strict=True):
        f1 = float(n == 0) if none else 2 * pairs / max(n + m, 1)
        records.append((1, none, f1 >= 1, none and n == 0, not none and n > 0, n, pairs, f1))
    return torch.from_numpy(np.array(records, dtype=np.float64).reshape(-1, len(COLUMNS)))


def _gathered(
    who: str, predictions: Sequence[Prediction], targets: Sequence[Tensor], threshold: float
) -> tuple[_Boxes, np.ndarray, _Boxes]:
    """The boxes with at least that score, their scores, and the true boxes."""
    parts = [_parts(who, index, prediction) for index, prediction in enumerate(predictions)]
    for index, boxes in enumerate(targets):
        if not (isinstance(boxes, Tensor) and boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.is_floating_point()):
            check_shape(who, **{f"targets[{index}]": (boxes, "M 4")})
            check_float(who, **{f"targets[{index}]": boxes})
    scores = _joined([score for _, score in parts])
    level = np.float64(threshold)  # numpy would round a Python number to the scores' float32
    keep = np.flatnonzero(scores >= level)
    bad = len(scores) - len(keep) - np.count_nonzero(scores < level)
    if bad:
        raise ValueError(f"{who}: `scores` must be numbers, got {bad} of {len(scores)} that are not.")
    ends = list(accumulate([score.numel() for _, score in parts], initial=0))
    joined = _joined([*(boxes for boxes, _ in parts), *targets]).reshape(-1, 4)
    xyxy = joined[np.concatenate([keep, np.arange(len(scores), len(joined))])]
    if not ((xyxy[:, 2:] >= xyxy[:, :2]).all() and np.isfinite(xyxy).all()):
        sound = (xyxy[:, 2:] >= xyxy[:, :2]).all(1) & np.isfinite(xyxy).all(1)
        argument = "predictions" if not sound[: len(keep)].all() else "targets"
        raise ValueError(f"{who}: boxes of `{argument}` must be finite xyxy with x1 <= x2 and y1 <= y2, got others.")
    true_starts = list(accumulate([boxes.shape[0] for boxes in targets], initial=len(keep)))
    return _Boxes(xyxy, keep.searchsorted(ends).tolist()), scores[keep], _Boxes(xyxy, true_starts)


def _parts(who: str, index: int, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Boxes and scores of one expression, checked; messages are made only when they are needed."""
    if not (isinstance(prediction, dict | Mapping) and "boxes_xyxy" in prediction and "scores" in prediction):
        got = f"one with {', '.join(prediction)}" if isinstance(prediction, Mapping) else type(prediction).__name__
        raise TypeError(f"{who}: `predictions[{index}]` must be a dict with boxes_xyxy and scores, got {got}.")
    boxes, scores = prediction["boxes_xyxy"], prediction["scores"]
    fits = isinstance(boxes, Tensor) and isinstance(scores, Tensor) and boxes.shape == (scores.numel(), 4) and scores.ndim == 1
    if not (fits and boxes.is_floating_point() and scores.is_floating_point()):
        names = (f"predictions[{index}]['scores']", f"predictions[{index}]['boxes_xyxy']")
        check_shape(who, **{names[0]: (scores, "N"), names[1]: (boxes, "N 4")})
        check_float(who, **{names[0]: scores, names[1]: boxes})
    return boxes, scores


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    """All parts in one array on the CPU, of float32 or float64: one transfer, however many there are."""
    joined = torch.cat(list(parts)) if len(parts) else torch.zeros(0)
    return (joined if joined.dtype == torch.float64 else joined.float()).numpy(force=True)


def _count_matches(kept: _Boxes, scores: np.ndarray, true: _Boxes, wanted: list[int], rule: _Rule) -> list[int]:
    """Matched pairs of each expression, the best pair first; expressions that are not ``wanted`` have none."""
    matched = [0] * (len(kept.starts) - 1)
    for chosen in _chunks(wanted, kept.counts, true.counts):
        overlap = _overlap(kept.corners(chosen)[..., None], true.corners(chosen)[..., None, :], rule.iou_type)
        pairs = np.flatnonzero(overlap >= np.float64(rule.overlap_threshold))  # of overlap, (chosen, kept, true)
        values = overlap.ravel()[pairs]
        order = np.argsort(-values)
        best_first = values[order]
        if (best_first[1:] == best_first[:-1]).any():
            expression, place, _ = np.unravel_index(pairs, overlap.shape)
            order = np.lexsort((pairs, _ranks(kept, scores)[np.array(kept.starts)[chosen][expression] + place], -values))
        for taken in _greedy(pairs[order], overlap.shape):
            matched[chosen[taken]] += 1
    return matched


def _chunks(wanted: list[int], kept: list[int], true: list[int]) -> Iterator[list[int]]:
    """Expressions to treat at once: as many as fit into the cache when all have as many boxes as the one with the most."""
    most = max((kept[index] for index in wanted), default=0) * max((true[index] for index in wanted), default=0)
    step = max(1, 2**14 // max(most, 1))
    return (wanted[start : start + step] for start in range(0, len(wanted), step))


def _ranks(kept: _Boxes, scores: np.ndarray) -> np.ndarray:
    """Which of two boxes goes first where overlaps tie: the higher score, then the larger coordinates, as in the evaluator."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.lexsort((*-kept.xyxy[: len(scores)].T[::-1], -scores))] = np.arange(len(scores))
    return ranks


def _greedy(pairs: np.ndarray, shape: tuple[int, ...]) -> list[int]:
    """The expression of each pair that is taken, when those of a box that is already taken are passed over."""
    expression, n, m = shape
    left = pairs // m
    right = left // n * m + pairs % m
    used_left, used_right, taken = bytearray(expression * n), bytearray(expression * m), []
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        if not (used_left[one] or used_right[other]):
            used_left[one] = used_right[other] = 1
            taken.append(one // n)
            if len(taken) == expression * min(n, m):
                break
    return taken


def _overlap(first: np.ndarray, second: np.ndarray, iou_type: str) -> np.ndarray:
    """IoU or generalised IoU of corners that broadcast, in the evaluator's order of operations, which decides borderline cases."""
    small = np.finfo(first.dtype).tiny  # instead of no area: then the part is 0 too
    sides = np.maximum(np.minimum(first[1], second[1]) - np.maximum(first[0], second[0]), 0)
    first_sides, second_sides = first[1] - first[0], second[1] - second[0]
    shared = sides[0] * sides[1]
    union = first_sides[0] * first_sides[1] + second_sides[0] * second_sides[1] - shared
    iou = shared / np.maximum(union, small)
    if iou_type == "iou":
        return iou
    sides = np.maximum(first[1], second[1]) - np.minimum(first[0], second[0])
    around = sides[0] * sides[1]
    return iou - (around - union) / np.maximum(around, small)


def _ratios(sums: Tensor, protocol: str) -> dict[str, Tensor]:
    total = dict(zip(COLUMNS, sums, strict=True))
    none = total["target_no_target"]
    some = total["expression"] - none
    accuracy = {"N_acc": percent(total["right_none"], none), "T_acc": percent(total["right_some"], some)}
    if protocol == "instancevg":
        accuracy = {name: value.nan_to_num(0.0) for name, value in accuracy.items()}
    return {"F1": percent(total["right"], total["expression"]), **accuracy}


def _why_undefined(sums: Tensor) -> str:
    expressions, none = int(sums[0]), int(sums[1])
    if expressions == 0:
        return "no expression was added"
    return "every expression has a target" if none == 0 else "no expression has a target"


def _samples(records: Tensor) -> dict[str, Tensor]:
    column = dict(zip(COLUMNS, records.unbind(1), strict=True))
    return {"kept": column["kept"].long(), "matched": column["matched"].long(), "f1": column["f1"]}
