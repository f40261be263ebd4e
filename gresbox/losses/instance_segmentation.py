"""Instance masks of all queries: matched ones learn their instance, the others an empty mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape, check_targets
from gresbox.losses.mask import MaskLoss, matched_masks
from gresbox.losses.targets import check_one_size, count_queries, mean_over
from gresbox.ops import stack_masks
from gresbox.structures import GresTarget, InstancePrediction

__all__ = ["InstanceMaskLoss", "instances_of_queries"]


def instances_of_queries(matches: Tensor, num_queries: int) -> Tensor:
    """Propagate a matching from targets to queries: the instance that each query answers for.

    A target's box and mask have one index, so the matching of boxes is the query-instance matching of IGVG, Sec. 3.1.2.

    Args:
        matches: The query of each target; -1 where none.
        num_queries: Queries per image.

    Shape:
        - ``matches``: ``(..., M)`` int64; returns ``(..., N)`` int64: the instance of each query, -1 where none.

    Example:
        >>> import torch
        >>> instances_of_queries(torch.tensor([[2, 0, -1]]), 4)
        tensor([[ 1, -1,  0, -1]])
    """
    count = matches.shape[-1]
    instances = matches.new_full((*matches.shape[:-1], num_queries + 1), -1)  # one more place for targets without a query
    index = torch.arange(count, device=matches.device).expand_as(matches)
    return instances.scatter(-1, matches.where(matches >= 0, num_queries), index)[..., :num_queries]


class InstanceMaskLoss(nn.Module):
    r"""Mask loss of matched queries with their instances, and of unmatched queries with nothing.

    .. math:: L = \frac1{N_{pos}} \sum_{i\,matched} L_{seg}(s_i, \hat s_{\omega(i)})
        + \frac{\lambda_{neg}}{N_{neg}} \sum_{i\,unmatched} L_{seg}(s_i, 0), \quad L_{seg} = \mathrm{BCE} + \mathrm{dice}

    Paper: "Instance-aware Generalized Multi-task Visual Grounding" (IGVG), Sec. 3.2, Eq. (6); code: Dmmm1997/InstanceVG,
    instancevg/models/losses/segloss.py.
    Differs from the code: a batch without matched, or without unmatched, queries has 0 for that part, not NaN.

    Both sums run over the whole batch, images without target included. Without ``unmatched`` only matched masks are built.

    Args:
        unmatched: Weight of unmatched queries; 0: they are left out.
        full_size: Compare at the targets' size, to which mask logits are resized, as in the code; False: at the masks' own size
            with area-averaged targets, a sixteenth of the work at a quarter of the size.
        mask_loss: How masks are compared; default: on all pixels. One with points or an ``upsample`` of its own compares at that
            size instead.

    Shape:
        - ``prediction``: ``N`` queries of ``B`` images; ``targets``: one per image, all of one size; ``matches``: ``(B, M)`` int64,
          the query of each instance, -1 where none; ``align_corners``: how the model resizes logits; ``num_instances``: see
          :func:`gresbox.losses.targets.count_queries`.
        - returns a dict of scalars: ``mask_bce``, ``mask_dice`` and, unless left out, ``unmatched_bce``, ``unmatched_dice``, the
          latter weighted.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If the weight is negative, or targets differ in number, size or device from what the prediction asks for.

    Example:
        >>> import torch
        >>> masks = torch.full((1, 2, 4, 4), -20.0)
        >>> masks[0, 1, :2] = 20.0
        >>> step = InstancePrediction.from_masks(torch.zeros(1, 2), masks, torch.zeros(1, 2, 8), torch.zeros(1, 3, 8))
        >>> losses = InstanceMaskLoss()(step, [GresTarget(masks[0, 1:] > 0)], torch.tensor([[1]]))
        >>> {name: round(loss.item(), 4) for name, loss in losses.items()}
        {'mask_bce': 0.0, 'mask_dice': 0.0, 'unmatched_bce': 0.0, 'unmatched_dice': 0.0}
    """

    def __init__(self, *, unmatched: float = 0.2, full_size: bool = True, mask_loss: MaskLoss | None = None) -> None:
        super().__init__()
        check_range("InstanceMaskLoss", "unmatched", unmatched, 0.0)
        self.unmatched = unmatched
        self.full_size = full_size
        self.mask_loss = MaskLoss() if mask_loss is None else mask_loss
        self._enlarges = full_size and self.mask_loss.num_points is None and self.mask_loss.upsample == 1

    def forward(
        self,
        prediction: InstancePrediction,
        targets: Sequence[GresTarget],
        matches: Tensor,
        *,
        align_corners: bool = False,
        num_instances: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        check_shape("InstanceMaskLoss", mask_embeddings=(prediction.mask_embeddings, "B N C"), matches=(matches, "B M"))
        check_targets("InstanceMaskLoss", targets, matches)
        check_one_size("InstanceMaskLoss", targets)
        batch, queries = prediction.mask_embeddings.shape[:2]
        truth = self._truth(prediction, targets)  # (B, M, H, W)
        if self.unmatched:
            instances = instances_of_queries(matches, queries)  # (B, N)
            matched = instances >= 0
            # One more, empty mask stands for "no instance"; index -1 finds it.
            truth = F.pad(truth, (0, 0, 0, 0, 0, 1))[torch.arange(batch, device=truth.device)[:, None], instances]  # (B, N, H, W)
            chosen = torch.arange(queries, device=matches.device).expand(batch, -1)
        else:
            matched, chosen = matches >= 0, matches
        bce, dice = self._compare(prediction, chosen[None], truth, align_corners)
        positive, negative = count_queries(targets, queries, num_instances)
        losses = {"mask_bce": mean_over((bce * matched).sum(), positive), "mask_dice": mean_over((dice * matched).sum(), positive)}
        if self.unmatched:
            for name, loss in {"unmatched_bce": bce, "unmatched_dice": dice}.items():
                losses[name] = self.unmatched * mean_over((loss * ~matched).sum(), negative)
        return losses

    def _truth(self, prediction: InstancePrediction, targets: Sequence[GresTarget]) -> Tensor:
        """The instances' masks, ``(B, M, H, W)``, at the size of the comparison."""
        masks = [target.masks for target in targets]
        if self.mask_loss.num_points is not None:
            return stack_masks(masks)[0]
        if self._enlarges:
            return stack_masks(masks, dtype=torch.bool)[0]
        height, width = prediction.pixels.shape[-2:]
        return stack_masks(masks, (height * self.mask_loss.upsample, width * self.mask_loss.upsample))[0]

    def _compare(self, prediction: InstancePrediction, chosen: Tensor, truth: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice of the chosen queries' masks, ``(1, B, K)`` indices to two ``(B, K)``."""
        if self._enlarges:
            masks = matched_masks([prediction], chosen)  # (B, 1, K, h, w)
            single = masks.flatten(0, 2)[:, None]  # masks may be none; then they must be in the batch axis
            single = F.interpolate(single, size=truth.shape[-2:], mode="bilinear", align_corners=align_corners)
            bce, dice = self.mask_loss(single[:, 0].unflatten(0, masks.shape[:3]), truth)
        else:
            bce, dice = self.mask_loss([prediction], truth, chosen)
        return bce[:, 0], dice[:, 0]

    def extra_repr(self) -> str:
        return f"unmatched={self.unmatched}, full_size={self.full_size}"
