"""Mask losses of matched instances: binary cross-entropy and dice, on all pixels or on sampled points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_float, check_range, check_shape
from gresbox.ops import mask_bce, mask_dice, matched_mask_losses, point_sample, uncertain_points
from gresbox.structures import InstancePrediction

__all__ = ["MaskLoss", "matched_masks", "share_pixels", "take_queries"]


def share_pixels(predictions: Sequence[InstancePrediction]) -> bool:
    """Whether all decoder steps predict from one tensor of pixel features, so that one product serves them all."""
    return all(step.pixels is predictions[0].pixels for step in predictions)


def take_queries(values: Tensor, indices: Tensor) -> Tensor:
    """The rows of chosen queries; a missing one (-1) takes query 0, whose loss the caller weights with 0.

    Shape:
        - ``values``: ``(..., N, C)``; ``indices``: ``(..., M)`` int64; returns ``(..., M, C)``.

    Example:
        >>> import torch
        >>> take_queries(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, 0, -1]]))[0, :, 0]
        tensor([3., 1., 1.])
    """
    where = indices.clamp(min=0)[..., None].expand(*indices.shape, values.shape[-1])
    return values.gather(-2, where)


def matched_masks(predictions: Sequence[InstancePrediction], indices: Tensor) -> Tensor:
    """The mask logits of matched queries of all decoder steps, and of no others.

    The shape depends on the largest number of instances in the batch alone, so nothing waits for the device. Places without a
    match hold query 0's mask and are for the caller to weight with 0.

    Args:
        predictions: The decoder steps.
        indices: The query of each target instance; -1 where there is none.

    Shape:
        - ``indices``: ``(S, B, M)`` int64; returns ``(B, S, M, h, w)``, float32 or float64.

    Raises:
        ValueError: If the number of steps disagrees.

    Example:
        >>> import torch
        >>> queries, tokens = torch.randn(1, 9, 4), torch.zeros(1, 3, 4)
        >>> step = InstancePrediction(torch.zeros(1, 9), queries, torch.randn(1, 4, 8, 8), queries, tokens)
        >>> masks = matched_masks([step, step], torch.tensor([[[3, 5]], [[8, 0]]]))
        >>> masks.shape, torch.allclose(masks[0, 1, 0], step.masks[0, 8], atol=1e-5)
        (torch.Size([1, 2, 2, 8, 8]), True)
    """
    _check_steps("matched_masks", "indices", predictions, indices)
    pixels = predictions[0].pixels
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    with torch.autocast(pixels.device.type, enabled=False):
        if share_pixels(predictions):
            embeddings = torch.stack([step.mask_embeddings for step in predictions], 1)  # (B, S, N, C)
            chosen = take_queries(embeddings, indices.transpose(0, 1)).to(dtype)  # (B, S, M, C)
            masks = torch.bmm(chosen.flatten(1, 2), pixels.to(dtype).flatten(2)).unflatten(1, chosen.shape[1:3])
        else:
            masks = torch.stack(
                [
                    torch.bmm(take_queries(step.mask_embeddings, index).to(dtype), step.pixels.to(dtype).flatten(2))
                    for step, index in zip(predictions, indices, strict=True)
                ],
                1,
            )
    return masks.unflatten(-1, pixels.shape[-2:])


def _compare_factored(predictions: Sequence[InstancePrediction], targets: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``(B, S, M)`` at the masks' own size; one pass over the pixels where all steps share them."""
    _check_steps("MaskLoss", "matches", predictions, matches)
    pixels = predictions[0].pixels
    embeddings = torch.stack([step.mask_embeddings for step in predictions])  # (S, B, N, C)
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    if share_pixels(predictions):
        losses = matched_mask_losses(embeddings, pixels, targets, matches, dtype=dtype)
    else:
        each = [
            matched_mask_losses(embeddings[index, None], step.pixels, targets, matches[index, None], dtype=dtype)
            for index, step in enumerate(predictions)
        ]
        losses = torch.cat([bce for bce, _ in each]), torch.cat([dice for _, dice in each])
    return losses[0].transpose(0, 1), losses[1].transpose(0, 1)


def _check_steps(who: str, argument: str, predictions: Sequence[InstancePrediction], indices: Tensor) -> None:
    check_shape(who, **{argument: (indices, "S B M")})
    if len(predictions) != indices.shape[0]:
        raise ValueError(f"{who}: `{argument}` must be (S, B, M) with S={len(predictions)}, got {tuple(indices.shape)}.")


class MaskLoss(nn.Module):
    r"""Binary cross-entropy and dice of several predictions of the same target masks.

    .. math:: \mathrm{bce} = \frac1P \sum_x \mathrm{BCE}(\sigma(s_x), t_x), \quad
        \mathrm{dice} = 1 - \frac{2 \sum_x \sigma(s_x) t_x + 1}{\sum_x \sigma(s_x) + \sum_x t_x + 1}

    Paper: arXiv:2411.15087, Sec. 3.4 (:math:`L_{mask}`); points as in Mask2Former, arXiv:2112.01527, Sec. 3.3.
    Differs from the paper: by default on all pixels at the masks' size with area-averaged targets, which is exact and, at a
    quarter of 480 pixels, cheaper than Mask2Former's points; ``num_points=12544`` gives Mask2Former's way.

    It takes ready masks, or decoder steps and the query of each target; then masks on all pixels at their own size are compared
    while they are still factored (:func:`gresbox.ops.matched_mask_losses`), and others are built first.

    Args:
        num_points: Points per mask; None: all pixels.
        upsample: Enlarge the predictions bilinearly by this factor before they are compared on all pixels, so that masks learn to
            be right after they were enlarged; at the masks' own size a thin object's edge cannot be expressed.
        oversample: Candidates per point, of which the most uncertain are kept.
        importance: Share of the points that are chosen by uncertainty; the rest is uniform.
        generator: Source of the random points.

    Shape:
        - ``masks``: ``(B, S, M, h, w)`` logits, or ``S`` decoder steps and ``matches``: ``(S, B, M)`` int64, -1 where there is no
          query; ``targets``: ``(B, M, H, W)`` in [0, 1] or bool, at the masks' size times ``upsample`` unless points are sampled.
        - returns two ``(B, S, M)``: bce and dice; what a target without a query gets is for the caller to weight with 0.

    Raises:
        TypeError: If decoder steps come without ``matches``.
        ValueError: If the shapes disagree or an option is out of range.

    Example:
        >>> import torch
        >>> masks, targets = torch.full((1, 1, 1, 4, 4), 20.0), torch.ones(1, 1, 4, 4)
        >>> bce, dice = MaskLoss()(masks, targets)
        >>> bool(bce.abs().max() < 1e-6), bool(dice.abs().max() < 1e-6)
        (True, True)
    """

    def __init__(
        self,
        num_points: int | None = None,
        *,
        upsample: int = 1,
        oversample: float = 3.0,
        importance: float = 0.75,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_points is not None:
            check_range("MaskLoss", "num_points", num_points, 1)
        check_range("MaskLoss", "upsample", upsample, 1)
        if num_points is not None and upsample != 1:
            raise ValueError(f"MaskLoss: `upsample` must be 1 with num_points={num_points}, got {upsample}.")
        check_range("MaskLoss", "oversample", oversample, 1.0)
        check_range("MaskLoss", "importance", importance, 0.0, 1.0)
        self.num_points = num_points
        self.upsample = upsample
        self.oversample = oversample
        self.importance = importance
        self.generator = generator

    def forward(
        self, masks: Tensor | Sequence[InstancePrediction], targets: Tensor, matches: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(masks, Tensor):
            return self._compare(masks, targets)
        if matches is None:
            raise TypeError("MaskLoss: `matches` must be given with decoder steps, got None.")
        if self.num_points is None and self.upsample == 1:
            return _compare_factored(masks, targets, matches)
        return self._compare(matched_masks(masks, matches), targets)

    def _compare(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of ready masks, ``(B, S, M, h, w)``."""
        check_shape("MaskLoss", masks=(masks, "B S M * *"))
        check_float("MaskLoss", masks=masks)
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
        if self.upsample > 1:
            single = masks.flatten(0, 2)[:, None]
            larger = F.interpolate(single, scale_factor=self.upsample, mode="bilinear", align_corners=False)
            masks = larger[:, 0].unflatten(0, masks.shape[:3])
        spec = "B M h w" if self.num_points is None else "B M H W"
        check_shape("MaskLoss", masks=(masks, "B S M h w"), targets=(targets, spec))
        targets = targets.to(masks.dtype)
        leading = masks.shape[:3]
        if self.num_points is None:
            values = masks.flatten(3)
            labels = targets.flatten(2)[:, None].expand_as(values)
        else:
            values, labels = self._sample(masks, targets)
        values, labels = values.flatten(0, 2), labels.flatten(0, 2)  # (B * S * M, P)
        return mask_bce(values, labels).view(leading), mask_dice(values, labels).view(leading)

    def _sample(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both at each mask's own points, ``(B, S, M, P)``; a target is read once for all its predictions."""
        batch, steps, count = masks.shape[:3]
        assert self.num_points is not None
        single = masks.flatten(0, 2)  # (B * S * M, h, w): every mask has its own points
        points = uncertain_points(
            single.detach(), self.num_points, oversample=self.oversample, importance=self.importance, generator=self.generator
        )
        values = point_sample(single[:, None], points).view(batch, steps, count, self.num_points)
        of_target = points.view(batch, steps, count, self.num_points, 2).transpose(1, 2)
        of_target = of_target.reshape(batch * count, steps * self.num_points, 2)
        labels = point_sample(targets.flatten(0, 1)[:, None], of_target).view(batch, count, steps, self.num_points)
        return values, labels.transpose(1, 2)

    def extra_repr(self) -> str:
        if self.num_points is None:
            return f"num_points=None, upsample={self.upsample}"
        return f"num_points={self.num_points}, oversample={self.oversample}, importance={self.importance}"
