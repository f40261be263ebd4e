"""Pixels of two masks, and of both: all that mask metrics read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gresbox.metrics._inputs import Masks

__all__ = ["Overlap", "mask_overlap"]


class Overlap(NamedTuple):
    """Pixel counts of pairs of masks, ``(B,)`` float64 each, which holds them exactly."""

    intersection: Tensor
    predicted: Tensor
    true: Tensor

    @property
    def union(self) -> Tensor:
        """Pixels in either mask."""
        return self.predicted + self.true - self.intersection

    @property
    def iou(self) -> Tensor:
        """``(B,)`` in [0, 1]; 0 where both masks are empty."""
        return self.intersection / self.union.clamp(min=1)

    def emptied(self, removed: Tensor) -> Overlap:
        """The counts after the predicted masks were emptied where ``removed``, float64, is 1 and not 0."""
        kept = 1 - removed
        return Overlap(self.intersection * kept, self.predicted * kept, self.true)


def mask_overlap(pred: Masks, target: Masks) -> Overlap:
    """Count the pixels of each pair on the predictions' device, without waiting for it.

    Args:
        pred: Bool masks, checked.
        target: As many, of the same sizes.
    """
    device = pred.device if isinstance(pred, Tensor) else (pred[0].device if len(pred) else torch.device("cpu"))
    if device.type == "cpu":
        # numpy counts bools eight at a time: 6 to 100 times as fast as torch's count or sum
        counts = [
            (np.count_nonzero(np.logical_and(one, other)), np.count_nonzero(one), np.count_nonzero(other))
            for one, other in zip(_arrays(pred), _arrays(target), strict=True)
        ]
        return Overlap(*torch.tensor(counts, dtype=torch.float64).reshape(-1, 3).unbind(1))
    if isinstance(pred, Tensor) and isinstance(target, Tensor):
        target = target.to(device)
        return Overlap(*(torch.count_nonzero(masks, dim=(1, 2)).double() for masks in (pred & target, pred, target)))
    pairs = [(one, other.to(one.device)) for one, other in zip(pred, target, strict=True)]
    triples = [torch.stack([torch.count_nonzero(masks) for masks in (one & other, one, other)]) for one, other in pairs]
    return Overlap(*torch.stack([triple.to(device) for triple in triples]).double().unbind(1))


def _arrays(masks: Masks) -> Iterable[np.ndarray]:
    return masks.numpy(force=True) if isinstance(masks, Tensor) else [mask.numpy(force=True) for mask in masks]
