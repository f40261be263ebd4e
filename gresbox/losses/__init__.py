"""Losses and criteria. A criterion takes a model's output and the targets and returns a dict of float32 scalars."""

from gresbox.losses.boxes import BoxLoss, box_giou_loss, box_l1_loss
from gresbox.losses.caris import CarisCriterion, weighted_cross_entropy
from gresbox.losses.detection import DetectionLoss, query_class_loss
from gresbox.losses.existence import ExistenceLoss, existence_loss
from gresbox.losses.igvg import IGVGCriterion, IGVGWeights
from gresbox.losses.instalign import InstAlignCriterion, InstAlignWeights
from gresbox.losses.instance_segmentation import InstanceMaskLoss, instances_of_queries
from gresbox.losses.mask import MaskLoss, matched_masks
from gresbox.losses.minimap import MinimapLoss, minimap_loss
from gresbox.losses.no_target import NoTargetLoss, no_target_loss
from gresbox.losses.poa import POALoss, poa_loss

__all__ = [
    "BoxLoss",
    "CarisCriterion",
    "DetectionLoss",
    "ExistenceLoss",
    "IGVGCriterion",
    "IGVGWeights",
    "InstAlignCriterion",
    "InstAlignWeights",
    "InstanceMaskLoss",
    "MaskLoss",
    "MinimapLoss",
    "NoTargetLoss",
    "POALoss",
    "box_giou_loss",
    "box_l1_loss",
    "existence_loss",
    "instances_of_queries",
    "matched_masks",
    "minimap_loss",
    "no_target_loss",
    "poa_loss",
    "query_class_loss",
    "weighted_cross_entropy",
]
