"""Matching of queries to boxes that prefers the query whose reference point lies near the box's centre."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gresbox._checks import check_choice, check_float, check_range, check_shape, check_targets
from gresbox.ops import assign, box_cxcywh_to_xyxy, generalized_box_iou
from gresbox.ops._late_errors import LateError
from gresbox.structures import GresTarget, InstancePrediction, PaddedTargets

__all__ = ["PointGuidedMatcher"]

# Boxes clipped to the picture in float32 may miss 0 and 1 by rounding; boxes in pixels miss them by far more.
ROUNDING = 1e-3


class PointGuidedMatcher(nn.Module):
    r"""Which query answers for which target box: the one-to-one matching of smallest total cost, guided by reference points.

    .. math:: C_{ij} = -\lambda_{cls}\, p_i + \lambda_{box} \lVert b_i - \hat b_j \rVert_1
        - \lambda_{giou}\, \mathrm{GIoU}(b_i, \hat b_j) + \lambda_{point} \lVert r_i - \hat c_j \rVert_1

    with :math:`p_i` the probability that query i is referred to, :math:`r_i` its reference point and :math:`\hat c_j` the centre
    of box j. An instance's mask and box have one index, so the matching of boxes is that of instances, too.

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.1.2, Eq. (4); code: Dmmm1997/InstanceVG,
    instancevg/core/matcher/matcher.py.
    Differs from the paper: the paper prints the cross-entropy and +GIoU; by default the class cost is the negative probability, as
    in the code, and the overlap counts against the cost. ``class_cost="cross_entropy"`` is the printed one.
    Differs from the code: an overlap has no 1e-6 in its denominator and is 0 where there is no area.

    All steps and images are priced together and one assignment serves them all. Where its kernel runs nothing waits for the device,
    and a NaN is reported by a later call (see :func:`gresbox.ops.assign`); elsewhere there is a single copy from the device per
    call. Nothing here carries a gradient. The L1 distances are sums over coordinates.

    Args:
        cls: Weight of the class cost.
        box: Weight of the L1 distance of boxes.
        giou: Weight of the generalised overlap.
        point: Weight of the L1 distance from reference point to box centre; it counts only where there are points.
        class_cost: ``"probability"`` or ``"cross_entropy"``.
        nan: ``"error"``, or ``"large"``: a NaN cost warns and counts as larger than any other.

    Shape:
        - ``forward(logits, boxes, points, targets)``: ``logits`` ``(B, N, 2)``, class 0 = referred to, class 1 = no object;
          ``boxes`` ``(B, N, 4)`` cxcywh; ``points`` ``(B, N, 2)`` xy in [0, 1], or None; ``targets`` one per image. Returns one
          pair ``(query_idx, target_idx)`` of int64 per image, each ``(min(N, M_b),)``, ordered by target.
        - ``match_steps(predictions, targets)`` returns ``(S, B, M)`` int64: the query of each target, -1 where none.

    Raises:
        TypeError: If a target is not a GresTarget or a prediction not floating-point.
        ValueError: If shapes or the number of targets disagree, a target is on another device, a target's box is outside [0, 1]
            (unless ``nan="large"``), or a cost is NaN; the message names what it was computed from.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]]])
        >>> points = torch.tensor([[[0.9, 0.9], [0.5, 0.6], [0.1, 0.1]]])
        >>> target = GresTarget(torch.ones(2, 8, 8, dtype=torch.bool), boxes[0, [2, 0]])
        >>> PointGuidedMatcher()(torch.zeros(1, 3, 2), boxes, points, [target])
        [(tensor([2, 1]), tensor([0, 1]))]
    """

    def __init__(
        self,
        *,
        cls: float = 1.0,
        box: float = 5.0,
        giou: float = 2.0,
        point: float = 2.0,
        class_cost: str = "probability",
        nan: str = "error",
    ) -> None:
        super().__init__()
        for name, weight in {"cls": cls, "box": box, "giou": giou, "point": point}.items():
            check_range("PointGuidedMatcher", name, weight, 0.0)
        check_choice("PointGuidedMatcher", "class_cost", class_cost, ("probability", "cross_entropy"))
        check_choice("PointGuidedMatcher", "nan", nan, ("error", "large"))
        self.cls, self.box, self.giou, self.point = cls, box, giou, point
        self.class_cost = class_cost
        self.nan = nan

    @torch.no_grad()
    def forward(
        self, logits: Tensor, boxes: Tensor, points: Tensor | None, targets: Sequence[GresTarget]
    ) -> list[tuple[Tensor, Tensor]]:
        shapes = {"logits": (logits, "B N 2"), "boxes": (boxes, "B N 4")}
        check_shape("PointGuidedMatcher", **shapes, **({} if points is None else {"points": (points, "B N 2")}))
        check_float("PointGuidedMatcher", logits=logits, boxes=boxes)
        read = {"logits": (logits[..., 0] - logits[..., 1])[None], "boxes": boxes[None]}
        if points is not None:
            read["points"] = points[None]
        rows = self._match(read, targets)[0]  # (B, M)
        pairs = []
        for row, target in zip(rows, targets, strict=True):
            count = target.masks.shape[0]
            matched = torch.arange(count, device=row.device)
            if count > logits.shape[1]:  # only then are some targets left without a query, and only then does the host ask which
                matched = row[:count].ge(0).nonzero()[:, 0]
            pairs.append((row[matched], matched))
        return pairs

    @torch.no_grad()
    def match_steps(self, predictions: Sequence[InstancePrediction], targets: Sequence[GresTarget]) -> Tensor:
        """Match several decoder steps with the same targets.

        Args:
            predictions: The steps, with ``boxes`` and, all or none of them, ``points``; ``score_logits`` are the class logits'
                difference, referred to minus no object.
            targets: One target per image.

        Shape:
            - returns ``(S, B, M)`` int64 with M the largest number of instances of an image; -1 where none.
        """
        if not predictions:
            raise ValueError("PointGuidedMatcher: `predictions` must be at least one decoder step, got none.")
        sizes: dict[str, tuple[Tensor, str]] = {}
        for index, step in enumerate(predictions):
            if step.boxes is None:
                raise ValueError(f"PointGuidedMatcher: `boxes` of step {index} must be there, got None.")
            if (step.points is None) != (predictions[0].points is None):
                raise ValueError("PointGuidedMatcher: `points` must be there in all steps or in none, got them in some.")
            sizes[f"score_logits of step {index}"] = (step.score_logits, "B N")
            sizes[f"boxes of step {index}"] = (step.boxes, "B N 4")
            if step.points is not None:
                sizes[f"points of step {index}"] = (step.points, "B N 2")
        check_shape("PointGuidedMatcher", **sizes)
        read = {"score_logits": torch.stack([step.score_logits for step in predictions])}
        read["boxes"] = torch.stack([step.boxes for step in predictions if step.boxes is not None])
        if predictions[0].points is not None:
            read["points"] = torch.stack([step.points for step in predictions if step.points is not None])
        return self._match(read, targets)

    def _match(self, read: dict[str, Tensor], targets: Sequence[GresTarget]) -> Tensor:
        """``read``: scores ``(S, B, N)``, boxes and perhaps points under the names that the caller knows them by."""
        scores, boxes = list(read.values())[:2]
        if isinstance(targets, PaddedTargets):
            raise TypeError(
                "PointGuidedMatcher: `targets` must be a list of GresTarget, because boxes are read, got PaddedTargets."
            )
        check_targets("PointGuidedMatcher", targets, scores[0])
        steps, batch = scores.shape[:2]
        counts = [target.masks.shape[0] for target in targets]
        if max(counts, default=0) == 0:
            return scores.new_empty((steps, batch, 0), dtype=torch.int64)
        scores, boxes = _wide(scores), _wide(boxes)
        truth = pad_sequence([target.boxes for target in targets if target.boxes is not None], batch_first=True).to(boxes)
        cost = self.box * (boxes[..., None, :] - truth[:, None]).abs().sum(-1)  # (S, B, N, M)
        if self.cls:
            probability = self.class_cost == "probability"
            cost += self.cls * (-scores.sigmoid() if probability else F.softplus(-scores))[..., None]
        if self.giou:
            corners = box_cxcywh_to_xyxy(truth).expand(steps, *truth.shape)
            overlap = torch.vmap(generalized_box_iou)(box_cxcywh_to_xyxy(boxes).flatten(0, 1), corners.flatten(0, 1))
            cost -= self.giou * overlap.unflatten(0, (steps, batch))
        if self.point and "points" in read:
            cost += self.point * (_wide(read["points"])[..., None, :] - truth[:, None, :, :2]).abs().sum(-1)
        inside = ((truth >= -ROUNDING) & (truth <= 1 + ROUNDING)).all(-1)  # (B, M)
        if self.nan == "error":  # what is wrong with a target travels with the one copy of the costs
            cost = cost.where(inside[:, None], torch.nan)
        try:
            rows = assign(cost.flatten(0, 1), torch.tensor(counts * steps), nan=self.nan)
        except LateError:  # of an earlier batch: this one's inputs say nothing about it
            raise
        except ValueError as error:
            raise ValueError(_blame(read, inside)) from error
        return rows.unflatten(0, (steps, batch))

    def extra_repr(self) -> str:
        weights = f"cls={self.cls}, box={self.box}, giou={self.giou}, point={self.point}"
        return f"{weights}, class_cost={self.class_cost!r}"


def _wide(values: Tensor) -> Tensor:
    """Float32 at least: costs rounded to 16 bits would tie."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _blame(read: dict[str, Tensor], inside: Tensor) -> str:
    """Name the input that spoiled the costs; runs after the error, so a good batch pays nothing."""
    if not inside.all():
        image = int(inside.all(-1).logical_not().nonzero()[0, 0])
        because = "divide boxes in pixels by the image's width and height"
        return f"PointGuidedMatcher: `targets` must have cxcywh boxes in [0, 1], got others in image {image}; {because}."
    for name, values in read.items():
        for index, step in enumerate(values):
            if not step.isfinite().all():
                kind = "NaN" if step.isnan().any() else "infinite"
                where = "" if name == "logits" or len(values) == 1 else f" of step {index}"
                return f"PointGuidedMatcher: `{name}`{where} must be finite because the cost reads them, got {kind} values."
    return "PointGuidedMatcher: `predictions` must give finite costs, got NaN of finite inputs: boxes overflow."
