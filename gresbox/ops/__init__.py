"""Functions: each is the definition in plain PyTorch, with a faster form of the same maths where that pays."""

from __future__ import annotations

from gresbox.ops.aggregation import aggregate_masks, aggregate_queries
from gresbox.ops.assignment import assign
from gresbox.ops.boxes import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou
from gresbox.ops.deformable import deformable_attention
from gresbox.ops.mask_costs import pairwise_mask_cost, query_mask_cost
from gresbox.ops.mask_losses import mask_bce, mask_dice
from gresbox.ops.mask_targets import stack_masks
from gresbox.ops.masked import masked_attention
from gresbox.ops.object_text import cross_attend_both
from gresbox.ops.phrase_alignment import align_phrases
from gresbox.ops.point_sampling import point_sample, uncertain_points

__all__ = [
    "aggregate_masks",
    "aggregate_queries",
    "align_phrases",
    "assign",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "cross_attend_both",
    "deformable_attention",
    "generalized_box_iou",
    "mask_bce",
    "mask_dice",
    "masked_attention",
    "pairwise_mask_cost",
    "point_sample",
    "query_mask_cost",
    "stack_masks",
    "uncertain_points",
]
