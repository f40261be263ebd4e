"""IGVG's criterion: boxes, instance masks, the global mask, the minimap and existence, each with its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice, check_range, check_targets
from gresbox.losses.detection import DetectionLoss
from gresbox.losses.existence import ExistenceLoss, existence_loss
from gresbox.losses.instance_segmentation import InstanceMaskLoss
from gresbox.losses.mask import MaskLoss
from gresbox.losses.minimap import minimap_loss
from gresbox.losses.targets import check_one_size, check_unpadded, instance_normaliser, merged_targets, no_target_flags
from gresbox.ops import mask_bce, mask_dice
from gresbox.structures import GresOutput, GresTarget

__all__ = ["IGVGCriterion", "IGVGWeights"]


@dataclass(frozen=True)
class IGVGWeights:
    r"""The weights of IGVG's losses; the defaults are the official code's. A weight of 0 leaves the loss out: it is not built.

    Args:
        detection: Everything that concerns boxes: class, L1 and GIoU; :math:`\lambda_{rec}` of Eq. (5).
        merged: Global mask, for cross-entropy and dice each; :math:`\lambda_{global}`. 0: no global supervision (Table 8).
        instance: Instance masks, for cross-entropy and dice each; :math:`\lambda_{instance}`. 0: no instance supervision
            (Table 8).
        unmatched: Masks of unmatched queries, inside ``instance``; :math:`\lambda_{neg}` of Eq. (6). 0: no negative supervision
            (Table 8), and only matched masks are built.
        minimap: Attention map of the query generation, for cross-entropy and dice each. 0: no minimap supervision (Fig. 4).
        existence: Existence loss; :math:`\lambda_{exist}`.
        cls: Class loss, inside ``detection``.
        box: L1 loss of matched boxes, inside ``detection``.
        giou: GIoU loss of matched boxes, inside ``detection``.
        no_object: Class weight of unmatched queries in the class loss.
        existence_classes: Weights of images with a target and of those without; None: the code's (0.9, 1.1) with the two-class
            form, none with the paper's.

    Example:
        >>> IGVGWeights(minimap=0.0)
        IGVGWeights(detection=0.1, merged=1.0, instance=1.0, unmatched=0.2, minimap=0.0, existence=0.2, cls=1.0, box=5.0, giou=2.0,
        no_object=0.1, existence_classes=None)
    """

    detection: float = 0.1
    merged: float = 1.0
    instance: float = 1.0
    unmatched: float = 0.2
    minimap: float = 0.1
    existence: float = 0.2
    cls: float = 1.0
    box: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1
    existence_classes: tuple[float, float] | None = None


class IGVGCriterion(nn.Module):
    r"""The training loss of IGVG.

    .. math:: L = \lambda_{rec} L_{detr} + \lambda_{global} L_{seg}(S) + \lambda_{instance} L_{ins} + \lambda_{minimap} L_{seg}(M_s)
        + \lambda_{exist} L_{exist}, \quad L_{seg} = \mathrm{BCE} + \mathrm{dice}

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.1.2 and 3.2, Eq. (4)-(6); weights and what is not
    printed from the code, Dmmm1997/InstanceVG.
    Differs from the paper: the minimap's loss has no term in Eq. (5); existence is the code's two-class form unless
    ``existence="bce"``.
    Differs from the code: earlier decoder layers have the weights of the last one unless ``aux_layers="official"``; an empty set of
    matched or unmatched queries has loss 0, not NaN.

    *What it reads.* ``instances`` and ``aux``, the last and the earlier layers, with ``score_logits`` ``(B, N)``, the difference of
    the two class logits, referred minus no object (their softmax is its sigmoid), ``boxes`` and, for a matcher that uses them,
    ``points``; the masks of ``instances`` alone; ``merged``; ``extras["minimap"]`` ``(B, h, w)``, attention or its logits;
    ``extras["existence"]`` ``(B, 2)`` logits, index 0 = a target exists, or ``(B, 1)`` with ``existence="bce"``. It does not read
    ``no_target``. The last layer's matching of boxes is that of instance masks, too.

    Nothing waits for the device but the matcher's one copy, whatever the number of layers and images.

    *Parts of a step.* Without ``num_instances`` the denominators are the code's: this batch's own instances, matched queries,
    unmatched queries and class weights. With it, the instances of the whole step divided by its number of equal parts, they
    follow from it and from B and N, and existence is divided by B: the mean loss of the parts is then the loss of the whole, as
    long as no image has more instances than queries. A step without instances counts as one with a single instance.

    *Gradients.* Class logits, global mask, minimap and existence get a gradient from every batch, and, unless ``weights.unmatched``
    is 0, so do query masks. Boxes get zeros, not None, from a batch without instances; masks, too, without ``unmatched``. What a
    weight of 0 leaves out gets none: a model must not build parts that only it would train.

    Args:
        matcher: Gives the query of each target for all layers, as :meth:`PointGuidedMatcher.match_steps` does.
        weights: The weights of the losses, and with 0 their switches.
        aux_layers: Weights of class, L1 and GIoU loss of earlier layers: ``"uniform"``: as the last layer's; ``"official"``: 1, 1
            and 1; ``"none"``: no loss.
        existence: ``"two_class"`` or ``"bce"``, the paper's; see :func:`existence_loss`.
        full_size: Compare instance masks at the targets' size; False: at their own, which is cheaper.
        minimap_resize: ``"nearest"`` or ``"area"``; see :func:`minimap_loss`.
        mask_loss: How instance masks are compared; default: on all pixels.

    Shape:
        - ``output``: what a model returns; ``targets``: one per image, all of one size; ``num_instances``: a positive number or
          scalar tensor; default: this batch's instances, at least 1.
        - returns a dict of float32 scalars: ``cls``, ``box``, ``giou``, ``mask_bce``, ``mask_dice``, ``unmatched_bce``,
          ``unmatched_dice``, ``merged_bce``, ``merged_dice``, ``minimap_bce``, ``minimap_dice``, ``existence``, each weighted, and
          ``loss``, their sum. What a weight leaves out, or ``extras`` does not hold, has no entry.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If targets differ in number, size or device from what the output asks for, the output has no instances or no
            boxes, a shape does not fit, or no weight is positive.

    Example:
        >>> import torch
        >>> from gresbox.structures import InstancePrediction
        >>> queries, tokens, boxes = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.rand(1, 3, 4)
        >>> step = InstancePrediction(torch.zeros(1, 3), queries, torch.randn(1, 4, 8, 8), queries, tokens, boxes=boxes)
        >>> extras = {"minimap": torch.rand(1, 2, 2), "existence": torch.zeros(1, 2)}
        >>> output = GresOutput(torch.zeros(1, 8, 8), instances=step, aux=(step,), extras=extras)
        >>> class FirstQueries(nn.Module):
        ...     def match_steps(self, predictions, targets):
        ...         return torch.arange(targets[0].masks.shape[0]).expand(len(predictions), 1, -1)
        >>> losses = IGVGCriterion(FirstQueries())(output, [GresTarget(torch.ones(2, 32, 32, dtype=torch.bool))])
        >>> sorted(losses)
        ['box', 'cls', 'existence', 'giou', 'loss', 'mask_bce', 'mask_dice', 'merged_bce', 'merged_dice', 'minimap_bce',
        'minimap_dice', 'unmatched_bce', 'unmatched_dice']
    """

    def __init__(
        self,
        matcher: Any,
        *,
        weights: IGVGWeights | None = None,
        aux_layers: str = "uniform",
        existence: str = "two_class",
        full_size: bool = True,
        minimap_resize: str = "nearest",
        mask_loss: MaskLoss | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights = IGVGWeights() if weights is None else weights
        _check_weights(weights)
        check_choice("IGVGCriterion", "aux_layers", aux_layers, ("uniform", "official", "none"))
        check_choice("IGVGCriterion", "existence", existence, ("two_class", "bce"))
        check_choice("IGVGCriterion", "minimap_resize", minimap_resize, ("nearest", "area"))
        self.matcher = matcher
        self.minimap_resize = minimap_resize
        self.detection_loss = DetectionLoss(
            cls=weights.cls, box=weights.box, giou=weights.giou, no_object=weights.no_object, aux_layers=aux_layers
        )
        self.instance_loss = InstanceMaskLoss(unmatched=weights.unmatched, full_size=full_size, mask_loss=mask_loss)
        self.existence_loss = ExistenceLoss(form=existence, class_weights=weights.existence_classes)

    def forward(
        self, output: GresOutput, targets: Sequence[GresTarget], *, num_instances: float | Tensor | None = None
    ) -> dict[str, Tensor]:
        check_unpadded("IGVGCriterion", targets)
        check_targets("IGVGCriterion", targets, output.merged)
        check_one_size("IGVGCriterion", targets)
        instance_normaliser("IGVGCriterion", targets, num_instances)
        weights = self.weights
        losses: dict[str, Tensor] = {}
        if weights.detection or weights.instance:
            losses |= self._instances(output, targets, num_instances)
        truth = merged_targets(targets)  # (B, H, W)
        if weights.merged:
            merged = output.resized((truth.shape[-2], truth.shape[-1])).flatten(1)
            for name, loss in {"merged_bce": mask_bce, "merged_dice": mask_dice}.items():
                losses[name] = weights.merged * loss(merged, truth.flatten(1)).mean()
        if weights.minimap and "minimap" in output.extras:
            bce, dice = minimap_loss(output.extras["minimap"], truth, resize=self.minimap_resize)
            losses |= {"minimap_bce": weights.minimap * bce.mean(), "minimap_dice": weights.minimap * dice.mean()}
        if weights.existence and "existence" in output.extras:
            losses["existence"] = weights.existence * self._existence(output, targets, whole=num_instances is None)
        if not losses:
            expected = "a minimap or existence logits, because nothing else has a weight"
            raise ValueError(f"IGVGCriterion: `output.extras` must hold {expected}, got {sorted(output.extras)}.")
        losses = {name: loss.float() for name, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _instances(
        self, output: GresOutput, targets: Sequence[GresTarget], num_instances: float | Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of boxes, of all layers, and of masks, of the last one."""
        last = output.instances
        if last is None:
            raise ValueError("IGVGCriterion: `output.instances` must be there, unless their weights are 0, got None.")
        steps = (*output.aux, last) if self.weights.detection and self.detection_loss.aux_layers != "none" else (last,)
        matches = self.matcher.match_steps(steps, targets)  # (S, B, M)
        losses: dict[str, Tensor] = {}
        if self.weights.detection:
            parts = self.detection_loss(steps, targets, matches, num_instances=num_instances)
            losses |= {name: self.weights.detection * loss for name, loss in parts.items()}
        if self.weights.instance:
            parts = self.instance_loss(last, targets, matches[-1], align_corners=output.align_corners, num_instances=num_instances)
            losses |= {name: self.weights.instance * loss for name, loss in parts.items()}
        return losses

    def _existence(self, output: GresOutput, targets: Sequence[GresTarget], *, whole: bool) -> Tensor:
        """The sum of class weights depends on the whole batch; a part of it is divided by its size instead."""
        logits = output.extras["existence"]
        return existence_loss(
            logits,
            no_target_flags(targets, logits.device),
            form=self.existence_loss.form,
            class_weights=self.existence_loss.class_weights,
            reduction="weights" if whole else "batch",
        )

    def extra_repr(self) -> str:
        return f"minimap_resize={self.minimap_resize!r}, weights={self.weights}"


def _check_weights(weights: IGVGWeights) -> None:
    """No weight is negative, and one of those of the total is positive."""
    for field in fields(weights):
        value = getattr(weights, field.name)
        for weight in value if isinstance(value, tuple | list) else () if value is None else (value,):
            check_range("IGVGCriterion", f"weights.{field.name}", weight, 0.0)
    if not any((weights.detection, weights.merged, weights.instance, weights.minimap, weights.existence)):
        raise ValueError("IGVGCriterion: `weights` must have a positive weight in the total loss, got none.")
