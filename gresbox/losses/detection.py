"""Detection as in DETR: is a query referred to, and where is its box; for every decoder layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gresbox._checks import check_choice, check_float, check_range, check_shape, check_targets
from gresbox.losses.boxes import BoxLoss
from gresbox.losses.instance_segmentation import instances_of_queries
from gresbox.losses.mask import take_queries
from gresbox.losses.targets import check_unpadded, count_queries, instance_normaliser, mean_over
from gresbox.structures import GresTarget, InstancePrediction

__all__ = ["DetectionLoss", "query_class_loss"]


def query_class_loss(score_logits: Tensor, matched: Tensor, *, no_object: float = 0.1) -> Tensor:
    r"""Cross-entropy of each query between "referred to" and "no object", weighted by class.

    .. math:: w_i\, \mathrm{CE}(l_i, y_i), \quad w_i = 1 \text{ where matched, } w_i = \lambda_{no\,object} \text{ elsewhere}

    Paper: Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, Sec. 3.1.
    Differs from the paper: nothing. With two classes the cross-entropy depends on the difference of the logits alone.

    Args:
        score_logits: Class logits' difference, referred to minus no object.
        matched: True where a query has an instance.
        no_object: Weight of queries without.

    Shape:
        - ``score_logits``: ``(..., N)``; ``matched``: ``(..., N)`` bool; returns ``(..., N)`` of at least float32.

    Raises:
        TypeError: If the logits are not floating-point.
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> query_class_loss(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, False, False]))
        tensor([0.1269, 0.0127, 0.2127])
    """
    check_float("query_class_loss", score_logits=score_logits)
    if matched.shape != score_logits.shape:
        expected = f"{tuple(score_logits.shape)} like `score_logits`"
        raise ValueError(f"query_class_loss: `matched` must be {expected}, got {tuple(matched.shape)}.")
    logits = score_logits.to(torch.promote_types(score_logits.dtype, torch.float32))
    return torch.where(matched, F.softplus(-logits), no_object * F.softplus(logits))


class DetectionLoss(nn.Module):
    r"""Class, L1 and GIoU losses of all decoder layers, each with its own matching.

    .. math:: L = \sum_{layers} \frac{\lambda_{cls}}{\sum_i w_i} \sum_i w_i\, \mathrm{CE}(l_i, y_i) + \frac1{\max(\#inst, 1)}
        \sum_{(i, j)\,matched} \lambda_{box} \lVert b_i - \hat b_j \rVert_1 + \lambda_{giou} (1 - \mathrm{GIoU}(b_i, \hat b_j))

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.2, "Detection", after arXiv:2005.12872; code:
    Dmmm1997/InstanceVG, instancevg/core/criterion/criterion.py.
    Differs from the code: nothing with ``aux_layers="official"``, where the weights of the last layer do not reach the earlier
    ones; by default all layers have the same, as in DETR.

    Args:
        cls: Weight of the class loss.
        box: Weight of the L1 loss.
        giou: Weight of the GIoU loss.
        no_object: Class weight of unmatched queries.
        aux_layers: Weights of the layers before the last: ``"uniform"``: the same; ``"official"``: 1, 1 and 1, as in the code;
            ``"none"``: no loss.

    Shape:
        - ``predictions``: ``S`` layers, the last one last, with ``score_logits`` ``(B, N)`` (class logits' difference, referred to
          minus no object) and ``boxes`` ``(B, N, 4)`` cxcywh; ``targets``: one per image; ``matches``: ``(S, B, M)`` int64, the
          query of each instance, -1 where none.
        - ``num_instances``: the instances of a larger step divided by its number of parts; default: those of this batch, at
          least 1.
        - returns a dict of scalars ``cls``, ``box``, ``giou``, each weighted and summed over the layers. Without any instance the
          last two are 0 and their gradients, too.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If shapes or numbers disagree, a step has no boxes, or a weight is negative.

    Example:
        >>> import torch
        >>> queries, tokens = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
        >>> boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]]])
        >>> step = InstancePrediction(torch.zeros(1, 3), queries, torch.randn(1, 4, 8, 8), queries, tokens, boxes=boxes)
        >>> target = GresTarget(torch.ones(1, 32, 32, dtype=torch.bool))
        >>> losses = DetectionLoss()([step, step], [target], torch.zeros(2, 1, 1, dtype=torch.int64))
        >>> {name: round(loss.item(), 4) for name, loss in losses.items()}
        {'cls': 1.3863, 'box': 0.0, 'giou': 0.0}
    """

    def __init__(
        self,
        *,
        cls: float = 1.0,
        box: float = 5.0,
        giou: float = 2.0,
        no_object: float = 0.1,
        aux_layers: str = "uniform",
    ) -> None:
        super().__init__()
        for name, weight in {"cls": cls, "box": box, "giou": giou, "no_object": no_object}.items():
            check_range("DetectionLoss", name, weight, 0.0)
        check_choice("DetectionLoss", "aux_layers", aux_layers, ("uniform", "official", "none"))
        self.cls, self.box, self.giou, self.no_object = cls, box, giou, no_object
        self.aux_layers = aux_layers
        self.box_loss = BoxLoss()

    def forward(
        self,
        predictions: Sequence[InstancePrediction],
        targets: Sequence[GresTarget],
        matches: Tensor,
        *,
        num_instances: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.aux_layers == "none":
            predictions, matches = predictions[-1:], matches[-1:]
        logits, boxes = _stacked(predictions, matches)
        check_unpadded("DetectionLoss", targets)
        check_targets("DetectionLoss", targets, logits[0])
        normaliser = instance_normaliser("DetectionLoss", targets, num_instances)
        matched, unmatched = count_queries(targets, logits.shape[-1], num_instances)

        referred = instances_of_queries(matches, logits.shape[-1]) >= 0  # (S, B, N)
        cls = query_class_loss(logits, referred, no_object=self.no_object).sum((1, 2))  # (S,)
        losses = {"cls": self._weighted(self.cls, mean_over(cls, matched + self.no_object * unmatched))}

        truth = pad_sequence([target.boxes for target in targets if target.boxes is not None], batch_first=True)  # (B, M, 4)
        chosen = take_queries(boxes, matches)  # (S, B, M, 4)
        l1, giou = self.box_loss(chosen, truth.expand_as(chosen))
        counted = matches >= 0
        losses["box"] = self._weighted(self.box, (l1 * counted).sum((1, 2)) / normaliser)
        losses["giou"] = self._weighted(self.giou, (giou * counted).sum((1, 2)) / normaliser)
        return losses

    def _weighted(self, weight: float, per_layer: Tensor) -> Tensor:
        """The sum over the layers, ``(S,)`` to a scalar; the last layer is the one that answers."""
        if self.aux_layers == "official":
            return weight * per_layer[-1] + per_layer[:-1].sum()
        return weight * per_layer.sum()

    def extra_repr(self) -> str:
        weights = f"cls={self.cls}, box={self.box}, giou={self.giou}, no_object={self.no_object}"
        return f"{weights}, aux_layers={self.aux_layers!r}"


def _stacked(predictions: Sequence[InstancePrediction], matches: Tensor) -> tuple[Tensor, Tensor]:
    """Score logits ``(S, B, N)`` and boxes ``(S, B, N, 4)`` of all layers, float32 at least."""
    missing = [index for index, step in enumerate(predictions) if step.boxes is None]
    if missing:
        raise ValueError(f"DetectionLoss: `boxes` of step {missing[0]} must be there, got None.")
    logits = torch.stack([step.score_logits for step in predictions])
    boxes = torch.stack([step.boxes for step in predictions if step.boxes is not None])
    named = {"score_logits": (logits, "S B N"), "boxes": (boxes, "S B N 4"), "matches": (matches, "S B M")}
    check_shape("DetectionLoss", **named)
    return (
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        boxes.to(torch.promote_types(boxes.dtype, torch.float32)),
    )
