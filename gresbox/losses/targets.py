"""What a criterion reads off the targets of a batch: flags, merged masks, and what its sums are divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gresbox._checks import check_range
from gresbox.structures import GresTarget, PaddedTargets

__all__ = [
    "check_one_size",
    "check_unpadded",
    "count_queries",
    "instance_masks",
    "instance_normaliser",
    "mean_over",
    "merged_targets",
    "no_target_flags",
]

Targets = Sequence[GresTarget] | PaddedTargets


def check_one_size(who: str, targets: Targets) -> None:
    """Check that all targets of a batch have one size.

    Raises:
        ValueError: If they have several.
    """
    sizes = sorted({tuple(masks.shape[-2:]) for masks in instance_masks(targets)})
    if len(sizes) > 1:
        raise ValueError(f"{who}: `targets` must all have one image size in a batch, got {sizes[0]} and {sizes[-1]}.")


def check_unpadded(who: str, targets: Targets) -> None:
    """Check that targets still have their boxes, which padded ones do not keep.

    Raises:
        TypeError: If they are padded.
    """
    if isinstance(targets, PaddedTargets):
        raise TypeError(f"{who}: `targets` must be a list of GresTarget, because boxes are read, got PaddedTargets.")


def instance_masks(targets: Targets) -> list[Tensor]:
    """The instances' masks of each image, ``(M_b, H, W)`` bool; padded targets keep their empty masks."""
    return list(targets.masks) if isinstance(targets, PaddedTargets) else [target.masks for target in targets]


def merged_targets(targets: Targets) -> Tensor:
    """The merged masks of a batch, ``(B, H, W)`` bool."""
    if isinstance(targets, PaddedTargets):
        return targets.merged
    return torch.stack([target.merged for target in targets if target.merged is not None])


def no_target_flags(targets: Targets, device: torch.device) -> Tensor:
    """``(B,)`` bool, True where nothing is referred to; copied without waiting for the device."""
    if isinstance(targets, PaddedTargets):
        return targets.no_target
    return torch.tensor([bool(target.no_target) for target in targets]).to(device, non_blocking=True)


def instance_normaliser(who: str, targets: Targets, num_instances: float | Tensor | None) -> float | Tensor:
    """What sums over instances are divided by: the given number, or this batch's instances, at least 1.

    A tensor stays on its device and is not looked at.

    Raises:
        ValueError: If a given number is not positive.
    """
    if num_instances is None and isinstance(targets, PaddedTargets):
        return targets.counts.sum().clamp(min=1).float()
    if num_instances is None:
        return float(max(sum(masks.shape[0] for masks in instance_masks(targets)), 1))
    if not isinstance(num_instances, Tensor) and not num_instances > 0:
        check_range(who, "num_instances", num_instances, torch.finfo(torch.float32).tiny)
    return num_instances


def count_queries(
    targets: Sequence[GresTarget], num_queries: int, num_instances: float | Tensor | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """How many queries of a batch have an instance, and how many have none, when every image matches as many as it can.

    With ``num_instances``, the instances of a larger step divided by its number of equal parts, they are the step's numbers
    divided in the same way, so that sums over a part divided by them average to the step's mean. That is exact as long as no
    image has more instances than queries.

    Args:
        targets: One target per image.
        num_queries: Queries per image.
        num_instances: None: the numbers of this batch.

    Example:
        >>> import torch
        >>> targets = [GresTarget(torch.ones(count, 4, 4, dtype=torch.bool)) for count in (3, 0)]
        >>> count_queries(targets, 10), count_queries(targets, 2), count_queries(targets, 10, 1.5)
        ((3.0, 17.0), (2.0, 2.0), (1.5, 18.5))
    """
    counts = [target.masks.shape[0] for target in targets]
    here = float(sum(min(count, num_queries) for count in counts))
    places = float(len(targets) * num_queries)
    if num_instances is None:
        return here, places - here
    matched = num_instances * (here / sum(counts) if here else 1.0)
    rest = places - matched
    # More instances elsewhere than there are queries here: this batch's own number is then the nearest that is known.
    if isinstance(matched, Tensor) and isinstance(rest, Tensor):
        return matched.clamp(max=places), torch.where(rest > 0, rest, places - here)
    return min(matched, places), rest if rest > 0 else places - here


def mean_over(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; what was summed over nothing stays 0.

    Example:
        >>> import torch
        >>> mean_over(torch.tensor(3.0), 2.0), mean_over(torch.tensor(0.0), 0.0)
        (tensor(1.5000), tensor(0.))
    """
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count, 1.0)
    return total / (count if count > 0 else 1.0)
