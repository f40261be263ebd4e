"""From queries to answers: scores, boxes in pixels, instance masks and their union with the global mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape
from gresbox.ops import box_cxcywh_to_xyxy
from gresbox.structures import GresOutput, GresPrediction, InstancePrediction

__all__ = ["Detections", "InstancePostprocess", "merge_masks"]


class Detections(NamedTuple):
    """The boxes of one image that are not empty; what is known of a query stays together under its index.

    Args:
        scores: ``(K,)`` in [0, 1], highest first.
        boxes_xyxy: ``(K, 4)`` pixels, inside the image.
        queries: ``(K,)`` int64, the query of each: index of its mask and point.
    """

    scores: Tensor
    boxes_xyxy: Tensor
    queries: Tensor


def merge_masks(global_mask: Tensor, instance_masks: Tensor, union: str = "merge") -> Tensor:
    """Everything that is referred to, from both branches.

    Args:
        global_mask: Mask of the global branch.
        instance_masks: Masks of the kept instances, possibly none.
        union: ``"merge"``: the global mask and every instance; ``"instance"``: the instances alone; ``"global"``: the global mask
            alone.

    Shape:
        - ``global_mask``: ``(H, W)`` bool; ``instance_masks``: ``(K, H, W)`` bool; returns ``(H, W)`` bool.

    Raises:
        ValueError: If ``union`` is unknown, or a shape does not fit.

    Example:
        >>> import torch
        >>> whole, parts = torch.tensor([[True, False]]), torch.tensor([[[False, True]]])
        >>> [merge_masks(whole, parts, union).tolist() for union in ("merge", "instance", "global")]
        [[[True, True]], [[False, True]], [[True, False]]]
    """
    check_choice("merge_masks", "union", union, ("merge", "instance", "global"))
    check_shape("merge_masks", global_mask=(global_mask, "H W"), instance_masks=(instance_masks, "K H W"))
    if union == "global":
        return global_mask
    instances = instance_masks.any(0)
    return instances if union == "instance" else global_mask | instances


class InstancePostprocess(nn.Module):
    r"""Answers from a model that predicts instances, a global mask and existence.

    .. math:: \mathrm{score}_q = \mathrm{softmax}(c_q)_0 \cdot \sigma(e_0),\quad K = \{q : \mathrm{score}_q > \tau\},\quad
              M = M_{global} \cup \bigcup_{q \in K} M_q

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 4.1 and Appendix D.
    Differs from the paper: that appendix is not public; this is the authors' code (Dmmm1997/InstanceVG, ``mix_gref_unimodel.py``,
    line 288), but an empty box takes its own mask along when it is dropped, where in the code the masks of later queries shift.

    Args:
        score_threshold: Instances are kept above this score.
        mask_threshold: Pixels belong to a mask from this probability on.
        union: ``"merge"``, ``"instance"`` or ``"global"``; see :func:`merge_masks`.
        existence: Factor of the scores: ``"sigmoid"`` of existence logit 0, as in the code; ``"softmax"``, the probability that the
            two logits give; ``"none"``: 1.
        nms_iou: Drop the lower of two boxes with a larger IoU; None: no such suppression, as in paper and code.
        no_target_threshold: None: the answer is "nothing" when no score is above ``score_threshold``, as in the code, and its
            probability is 1 minus the highest score. A number: when the probability of ``output.no_target`` is above it.
        blank: Empty the mask when the answer is "nothing"; off: the code, which leaves that to the evaluator.

    Shape:
        - ``output``: ``merged`` ``(B, h, w)``, ``instances`` with boxes, and unless ``existence="none"`` ``extras["existence"]``
          ``(B, 2)`` or ``(B, 1)``, index 0 = a target exists; ``sizes``: height and width of each image; ``texts``: one per image.
        - returns one :class:`~gresbox.structures.GresPrediction` per image, instances by falling score. Masks are resized to the
          image as logits. An instance whose mask is empty is kept: it has a box.

    Raises:
        ValueError: If an option is out of range, or the output lacks what is read.

    Example:
        >>> import torch
        >>> queries, pixels = torch.randn(1, 3, 8), torch.randn(1, 8, 16, 16)
        >>> boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 3, 4)
        >>> scores = torch.tensor([[4.0, -4.0, 3.0]])
        >>> step = InstancePrediction(scores, queries, pixels, queries, torch.randn(1, 5, 8), boxes=boxes)
        >>> output = GresOutput(torch.randn(1, 16, 16), instances=step, extras={"existence": torch.tensor([[3.0, -3.0]])})
        >>> (answer,) = InstancePostprocess()(output, [(48, 64)])
        >>> answer.instance_masks.shape, answer.boxes_xyxy[0]
        (torch.Size([2, 48, 64]), tensor([25.6000, 19.2000, 38.4000, 28.8000]))
    """

    def __init__(
        self,
        *,
        score_threshold: float = 0.7,
        mask_threshold: float = 0.5,
        union: str = "merge",
        existence: str = "sigmoid",
        nms_iou: float | None = None,
        no_target_threshold: float | None = None,
        blank: bool = True,
    ) -> None:
        super().__init__()
        who = "InstancePostprocess"
        limits = {"score_threshold": score_threshold, "mask_threshold": mask_threshold}
        limits |= {} if nms_iou is None else {"nms_iou": nms_iou}
        limits |= {} if no_target_threshold is None else {"no_target_threshold": no_target_threshold}
        for name, value in limits.items():
            check_range(who, name, value, 0, 1)
        check_choice(who, "union", union, ("merge", "instance", "global"))
        check_choice(who, "existence", existence, ("sigmoid", "softmax", "none"))
        self.score_threshold, self.mask_threshold, self.union = score_threshold, mask_threshold, union
        self.existence, self.nms_iou = existence, nms_iou
        self.no_target_threshold, self.blank = no_target_threshold, blank

    @torch.no_grad()
    def forward(
        self, output: GresOutput, sizes: Sequence[tuple[int, int]], texts: Sequence[str] | None = None
    ) -> list[GresPrediction]:
        if texts is not None and len(texts) != output.merged.shape[0]:
            raise ValueError(
                f"InstancePostprocess: `texts` must be one per image with B={output.merged.shape[0]}, got {len(texts)}."
            )
        step = self._instances(output, sizes)
        answers = []
        for index, (size, found) in enumerate(zip(sizes, self.detect(output, sizes), strict=True)):
            nothing, probability = self._no_target(output, index, found)
            chosen = found.queries[(found.scores > self.score_threshold) & (not nothing)]
            keep = slice(len(chosen))  # scores fall
            masks = self._masks(step.masks_of(torch.full_like(chosen, index), chosen), size, output.align_corners)
            merged = self._masks(output.merged[index : index + 1], size, output.align_corners)[0]
            answers.append(
                GresPrediction(
                    text="" if texts is None else texts[index],
                    mask=merge_masks(merged, masks, self.union) & (not (nothing and self.blank)),
                    no_target_prob=probability,
                    scores=found.scores[keep],
                    instance_masks=masks,
                    boxes_xyxy=found.boxes_xyxy[keep],
                    points=None if step.points is None else step.points[index, chosen] * _scale(size, step.points),
                )
            )
        return answers

    @torch.no_grad()
    def detect(self, output: GresOutput, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """All boxes of each image that are not empty, whatever their score, after the suppression if there is one.

        :class:`~gresbox.metrics` of detection apply a threshold of their own; ``found._asdict()`` is the form that they take.
        """
        from torchvision.ops import nms

        step = self._instances(output, sizes)
        scores = self._scores(step, output)
        found = []
        for size, score, box in zip(sizes, scores, step.boxes, strict=True):  # type: ignore[arg-type]
            scale = _scale(size, box).repeat(2)
            corners = torch.minimum((box_cxcywh_to_xyxy(box.float()) * scale).clamp(min=0), scale)
            order = score.argsort(descending=True, stable=True)
            order = order[(corners[order, 2:] > corners[order, :2]).all(1)]
            if self.nms_iou is not None:
                order = order[nms(corners[order], score[order], self.nms_iou)]
            found.append(Detections(score[order], corners[order], order))
        return found

    def _instances(self, output: GresOutput, sizes: Sequence[tuple[int, int]]) -> InstancePrediction:
        """The instances, after a look at what must be there."""
        who, step = "InstancePostprocess", output.instances
        if step is None or step.boxes is None:
            raise ValueError(f"{who}: `output.instances` must hold boxes, got {'none' if step is None else 'some without boxes'}.")
        if len(sizes) != output.merged.shape[0]:
            raise ValueError(f"{who}: `sizes` must be one per image with B={output.merged.shape[0]}, got {len(sizes)}.")
        empty = [tuple(size) for size in sizes if min(size) < 1]
        if empty:
            raise ValueError(f"{who}: `sizes` must be heights and widths of at least 1, got {empty[0]}.")
        return step

    def _scores(self, step: InstancePrediction, output: GresOutput) -> Tensor:
        """Probability of each query, ``(B, N)`` float32."""
        scores = step.score_logits.float().sigmoid()
        if self.existence == "none":
            return scores
        if "existence" not in output.extras:
            raise ValueError(
                "InstancePostprocess: `output.extras` must hold 'existence' (existence='none' does without), "
                f"got {sorted(output.extras)}."
            )
        logits = output.extras["existence"].float()
        exists = logits.softmax(1) if self.existence == "softmax" and logits.shape[1] == 2 else logits.sigmoid()
        return scores * exists[:, :1]

    def _no_target(self, output: GresOutput, index: int, found: Detections) -> tuple[bool, float]:
        """Whether the answer is "nothing", and its probability."""
        if self.no_target_threshold is None:
            best = float(found.scores[0]) if len(found.scores) else 0.0
            return not bool((found.scores > self.score_threshold).any()), 1.0 - best
        if output.no_target is None:
            raise ValueError("InstancePostprocess: `output.no_target` must be there for a no_target_threshold, got None.")
        probability = float(output.no_target[index].float().sigmoid())
        return probability > self.no_target_threshold, probability

    def _masks(self, logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        """``(K, h, w)`` logits as bool masks of the image's size."""
        if not len(logits):
            return logits.new_zeros((0, *size), dtype=torch.bool)
        resized = F.interpolate(logits.float()[:, None], size=size, mode="bilinear", align_corners=align_corners)
        return resized[:, 0].sigmoid() >= self.mask_threshold


def _scale(size: tuple[int, int], like: Tensor) -> Tensor:
    """Width and height, ``(2,)`` float32."""
    return torch.tensor([size[1], size[0]], dtype=torch.float32, device=like.device)
