"""Matching and mask losses as Mask2Former's code runs them: layer by layer, image by image, with masks that are built in full.

Of facebookresearch/Mask2Former at 161be51, ``mask2former/modeling/matcher.py`` (``batch_dice_loss``, ``batch_sigmoid_ce_loss``,
``HungarianMatcher.memory_efficient_forward``, lines 15-156) and ``mask2former/modeling/criterion.py`` (``dice_loss``,
``sigmoid_ce_loss``, ``SetCriterion.loss_masks``, lines 21-190). As there a cost takes two cross-entropies and three products, every
image waits for the device once per layer, and matched masks are taken out of all masks by index.

Different from that file: queries have a relevance instead of classes, so the class cost is the cross-entropy with 1 and the class
loss is InstAlign's. With ``num_points=None`` all pixels are compared with area-averaged targets, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Pairs = list[tuple[Tensor, Tensor]]


def match_layer(
    score_logits: Tensor, masks: Tensor, targets: Sequence[Tensor], *, score: float, mask: float, num_points: int | None
) -> Pairs:
    """``(B, N)``, ``(B, N, h, w)`` and per image ``(M, H, W)`` -> per image the matched queries and their targets."""
    with torch.no_grad():
        pairs = []
        for logits, predicted, truth in zip(score_logits, masks, targets, strict=True):
            if num_points is None:
                values, labels = predicted.flatten(1), area_average(truth, predicted.shape[-2:]).to(predicted).flatten(1)
            else:
                points = torch.rand(1, num_points, 2, device=masks.device, dtype=masks.dtype)
                values, labels = read_at(predicted, points), read_at(truth.to(predicted), points)
            cost = mask * cross_entropy_of_pairs(values, labels) + mask * dice_of_pairs(values, labels)
            cost = cost + score * F.softplus(-logits)[:, None]
            pairs.append(solve(cost.cpu()))
        return pairs


def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:  # a reference needs no SciPy; a form that is timed asks for it before
        rows, columns = assign_exactly(cost.numpy()), np.arange(cost.shape[1])
    else:
        rows, columns = linear_sum_assignment(cost)
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


def cross_entropy_of_pairs(masks: Tensor, targets: Tensor) -> Tensor:
    positive = F.binary_cross_entropy_with_logits(masks, torch.ones_like(masks), reduction="none")
    negative = F.binary_cross_entropy_with_logits(masks, torch.zeros_like(masks), reduction="none")
    total = torch.einsum("nc,mc->nm", positive, targets) + torch.einsum("nc,mc->nm", negative, 1 - targets)
    return total / masks.shape[1]


def dice_of_pairs(masks: Tensor, targets: Tensor) -> Tensor:
    probs = masks.sigmoid()
    return 1 - (2 * torch.einsum("nc,mc->nm", probs, targets) + 1) / (probs.sum(-1)[:, None] + targets.sum(-1)[None] + 1)


def mask_losses_of_layer(
    masks: Tensor, targets: Sequence[Tensor], pairs: Pairs, normaliser: float, num_points: int | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of the matched masks of one layer."""
    images = torch.cat([torch.full_like(rows, image) for image, (rows, _) in enumerate(pairs)])
    chosen = masks[images, torch.cat([rows for rows, _ in pairs])]  # (K, h, w)
    most = max(truth.shape[0] for truth in targets)
    padded = torch.zeros(len(targets), most, *targets[0].shape[-2:], dtype=masks.dtype, device=masks.device)
    for place, truth in zip(padded, targets, strict=True):
        place[: truth.shape[0]].copy_(truth)
    wanted = padded[images, torch.cat([columns for _, columns in pairs])]
    if num_points is None:
        values, labels = chosen.flatten(1), area_average(wanted, chosen.shape[-2:]).flatten(1)
    else:
        points = uncertain_points_of(chosen.detach(), num_points)
        values, labels = read_each_at(chosen, points), read_each_at(wanted, points)
    bce = F.binary_cross_entropy_with_logits(values, labels, reduction="none").mean(1).sum() / normaliser
    probs = values.sigmoid()
    dice = 1 - (2 * (probs * labels).sum(-1) + 1) / (probs.sum(-1) + labels.sum(-1) + 1)
    return bce, dice.sum() / normaliser


def uncertain_points_of(masks: Tensor, num_points: int, *, oversample: float = 3.0, importance: float = 0.75) -> Tensor:
    """PointRend's choice: of three times as many random points the most uncertain, and a quarter at random."""
    candidates = torch.rand(len(masks), int(num_points * oversample), 2, device=masks.device, dtype=masks.dtype)
    kept = int(importance * num_points)
    nearest = (-read_each_at(masks, candidates).abs()).topk(kept, dim=1).indices
    fresh = torch.rand(len(masks), num_points - kept, 2, device=masks.device, dtype=masks.dtype)
    return torch.cat([candidates.gather(1, nearest[..., None].expand(-1, -1, 2)), fresh], 1)


def read_at(maps: Tensor, points: Tensor) -> Tensor:
    """All maps at the same points, which are repeated for each: ``(K, H, W)``, ``(1, P, 2)`` -> ``(K, P)``."""
    return read_each_at(maps, points.repeat(maps.shape[0], 1, 1))


def read_each_at(maps: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(maps[:, None], (2 * points - 1)[:, :, None], align_corners=False)[:, 0, :, 0]


def area_average(masks: Tensor, size: Sequence[int]) -> Tensor:
    if masks.shape[0] == 0:
        return masks.new_zeros(0, *size)
    return F.interpolate((masks if masks.is_floating_point() else masks.float())[:, None], size=tuple(size), mode="area")[:, 0]


def assign_exactly(cost: np.ndarray) -> np.ndarray:
    """The row of each column ``(N, M)``, M <= N, at the smallest total: shortest augmenting paths, without any library."""
    rows, columns = cost.shape
    price_row, price_column = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(rows, -1)  # column of each row
    for start in range(columns):
        shortest, before, seen = np.full(rows, np.inf), np.full(rows, -1), np.zeros(rows, dtype=bool)
        column, last = start, -1
        while True:
            offer = cost[:, column] - price_column[column] - price_row + (0.0 if last < 0 else shortest[last])
            better = ~seen & (offer < shortest)
            shortest[better], before[better] = offer[better], last
            last = int(np.where(seen, np.inf, shortest).argmin())
            seen[last] = True
            if owner[last] < 0:
                break
            column = owner[last]
        settled = seen & (owner >= 0)
        price_column[start] += shortest[last]
        price_column[owner[settled]] += shortest[last] - shortest[settled]
        price_row[settled] -= shortest[last] - shortest[settled]
        while last >= 0:
            owner[last] = owner[before[last]] if before[last] >= 0 else start
            last = before[last]
    row_of = np.full(columns, -1)
    taken = owner >= 0
    row_of[owner[taken]] = np.nonzero(taken)[0]
    return row_of
