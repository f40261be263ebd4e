"""Losses and criteria. A criterion takes a model's output and the targets and returns a dict of float32 scalars."""

from gresbox.losses.instalign import InstAlignCriterion, InstAlignWeights
from gresbox.losses.mask import MaskLoss, matched_masks
from gresbox.losses.no_target import NoTargetLoss, no_target_loss
from gresbox.losses.poa import POALoss, poa_loss

__all__ = [
    "InstAlignCriterion",
    "InstAlignWeights",
    "MaskLoss",
    "NoTargetLoss",
    "POALoss",
    "matched_masks",
    "no_target_loss",
    "poa_loss",
]
