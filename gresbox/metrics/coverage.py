"""CoverAcc: how many target boxes hold at least one of the points that a model selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gresbox._checks import check_shape
from gresbox.metrics._inputs import Ids, check_length, check_numbers
from gresbox.metrics._overlap import rows
from gresbox.metrics._records import RecordMetric, percent, warn_undefined

__all__ = ["CoverageAccuracy", "coverage_accuracy"]

COLUMNS = ("picture", "coverage", "covered", "boxes")


class CoverageAccuracy(RecordMetric):
    r"""The mean share of a picture's target boxes that hold at least one selected point, in percent.

    .. math:: \mathrm{CoverAcc} = \mathrm{mean}_{M > 0} \frac{|\{m : \exists k, \; p_k \in b_m\}|}{M}

    A point on the border of a box is in it. Pictures without a target box are left out.

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Eq. (3).
    Differs from the released code (InstanceVG, arXiv:2509.13747): that scales the points' columns by height and width in exchange,
    which is the same for square inputs only; and a point within rounding of a border is on it.

    Args:
        per_sample: Keep each picture's numbers and return them too, as :func:`coverage_accuracy` does.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        - :meth:`update`: ``points`` ``(B, K, 2)`` xy in [0, 1]; ``boxes`` B tensors ``(M_i, 4)`` cxcywh in [0, 1], ``M_i`` may
          be 0; ``sample_ids`` ``(B,)`` integers or None: an id that came before, here or in another process, is not counted again.
        - :meth:`compute`: a dict with the float64 scalar ``CoverAcc``.

    Raises:
        ValueError: If shapes or lengths disagree, a number is NaN or outside [0, 1].
        TypeError: If points or boxes are not floating-point.

    Example:
        >>> import torch
        >>> metric = CoverageAccuracy()
        >>> metric.update(torch.tensor([[[0.2, 0.2], [0.9, 0.1]]]), [torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]])])
        >>> metric.compute()
        {'CoverAcc': tensor(50., dtype=torch.float64)}
    """

    columns = COLUMNS
    vectors = frozenset({"covered", "boxes", "sample_id"})

    def __init__(self, *, per_sample: bool = False, **kwargs: object) -> None:
        super().__init__(per_sample=per_sample, **kwargs)

    def update(self, points: Tensor, boxes: Sequence[Tensor], *, sample_ids: Ids | None = None) -> None:
        """Add a batch of pictures; waits for the device once, to check the numbers."""
        self._add("CoverageAccuracy.update", _score("CoverageAccuracy.update", points, boxes), sample_ids)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        return _ratios(sums)

    def _why_undefined(self, sums: Tensor) -> str:
        return _why_undefined(sums)

    def _samples(self, records: Tensor) -> dict[str, Tensor]:
        return _samples(records)


def coverage_accuracy(points: Tensor, boxes: Sequence[Tensor], *, per_sample: bool = False) -> dict[str, Tensor]:
    """The metric of :class:`CoverageAccuracy` of all pictures at once.

    Args:
        points: Selected points.
        boxes: Each picture's target boxes.
        per_sample: Also return each picture's ``covered`` and ``boxes``, their numbers.

    Shape:
        - ``points``: ``(B, K, 2)`` xy in [0, 1]; ``boxes``: B tensors ``(M_i, 4)`` cxcywh in [0, 1].
        - returns the float64 scalar ``CoverAcc`` in percent; with ``per_sample`` also ``(B,)`` tensors.

    Raises:
        ValueError: If shapes or lengths disagree, a number is NaN or outside [0, 1].
        TypeError: If points or boxes are not floating-point.

    Example:
        >>> import torch
        >>> whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
        >>> coverage_accuracy(torch.tensor([[[0.0, 0.3]], [[0.2, 0.2]]]), [whole, whole[:0]])
        {'CoverAcc': tensor(100., dtype=torch.float64)}
    """
    records = _score("coverage_accuracy", points, boxes)
    sums = records.sum(0)
    result = _ratios(sums)
    warn_undefined("coverage_accuracy", result, _why_undefined(sums))
    return {**result, **_samples(records)} if per_sample else result


def _score(who: str, points: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    size = check_shape(who, points=(points, "B K 2"))["B"]
    check_length(who, "boxes", len(boxes), size, "tensors as pictures in `points`")
    for index, part in enumerate(boxes):
        check_shape(who, **{f"boxes[{index}]": (part, "M 4")})
    device = points.device
    joined = torch.cat([part.to(device) for part in boxes]) if size else points.new_empty(0, 4)
    check_numbers(who, "points", points, 0, 1)
    check_numbers(who, "boxes", joined, 0, 1)
    counts = torch.tensor([len(part) for part in boxes], dtype=torch.int64, device=device)
    owner = torch.repeat_interleave(torch.arange(size, device=device), counts, output_size=len(joined))
    centre, half = joined[:, None, :2].double(), joined[:, None, 2:].double() / 2
    exact = points.dtype == joined.dtype == torch.float64
    rounding = torch.finfo(torch.float64 if exact else torch.float32).eps  # corners made from cxcywh are rounded; borders count
    inside = ((points[owner].double() - centre).abs() <= half + rounding).all(-1).any(-1)  # (M_1 + ... + M_B,)
    covered = torch.zeros(size, dtype=torch.float64, device=device).index_add(0, owner, inside.double())
    total = counts.double()
    return rows([total > 0, covered / total.clamp(min=1), covered, total])


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    return {"CoverAcc": percent(sums[1], sums[0])}


def _why_undefined(sums: Tensor) -> str:
    return "no picture with a target box was added"


def _samples(records: Tensor) -> dict[str, Tensor]:
    return {"covered": records[:, 2].long(), "boxes": records[:, 3].long()}
