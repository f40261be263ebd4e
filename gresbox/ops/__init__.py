"""Functions: each is the definition in plain PyTorch, with a faster form of the same maths where that pays."""

from __future__ import annotations

from gresbox.ops.aggregation import aggregate_masks, aggregate_queries
from gresbox.ops.assignment import assign
from gresbox.ops.block_filter import filter_blocks
from gresbox.ops.boxes import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou
from gresbox.ops.deformable import deformable_attention
from gresbox.ops.mask_costs import pairwise_mask_cost, query_mask_cost
from gresbox.ops.mask_losses import mask_bce, mask_dice, matched_mask_losses
from gresbox.ops.mask_targets import stack_masks
from gresbox.ops.masked import masked_attention
from gresbox.ops.object_text import cross_attend_both
from gresbox.ops.patch_matching import inner_tokens, match_patches, random_projections
from gresbox.ops.phrase_alignment import align_phrases
from gresbox.ops.point_sampling import point_sample, uncertain_points
from gresbox.ops.point_selection import select_points

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
    "filter_blocks",
    "generalized_box_iou",
    "inner_tokens",
    "mask_bce",
    "mask_dice",
    "masked_attention",
    "match_patches",
    "matched_mask_losses",
    "pairwise_mask_cost",
    "point_sample",
    "query_mask_cost",
    "random_projections",
    "select_points",
    "stack_masks",
    "uncertain_points",
]
