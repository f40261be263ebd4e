"""Neural network modules: every one works alone and combines with the others."""

from __future__ import annotations

from gresbox.blocks.alignment_masking import AlignmentAwareMasking, RandomBlockMasking
from gresbox.blocks.attention import MultiHeadAttention
from gresbox.blocks.caris_decoder import CarisDecoder, CarisLayer
from gresbox.blocks.conditional_prompts import ConditionalPrompts
from gresbox.blocks.deformable_attention import DeformableAttention
from gresbox.blocks.deformable_decoder import DecodedQueries, DeformableDecoder, DETRDecoder, LearnedPrior, PointPrior
from gresbox.blocks.feature_pyramid import SimpleFeaturePyramid
from gresbox.blocks.heads import MLP, BoxHead, ExistenceHead, FeedForward, GlobalMaskHead, InstanceHead, inverse_sigmoid
from gresbox.blocks.instance_aggregation import AdaptiveInstanceAggregation
from gresbox.blocks.no_target import NoTargetHead
from gresbox.blocks.object_text import (
    GatedObjectText,
    ParallelObjectText,
    SequentialObjectText,
    SharedObjectText,
)
from gresbox.blocks.phrase_object import (
    PhraseObjectBlock,
    PhraseObjectTransformer,
    attention_mask_logits,
    downsample_pixels,
)
from gresbox.blocks.pixel_decoder import MSDeformPixelDecoder
from gresbox.blocks.point_selection import DistScorePointSelector, cell_centres
from gresbox.blocks.position import sine_position, sine_position_1d
from gresbox.blocks.postprocess import Detections, InstancePostprocess, merge_masks
from gresbox.blocks.query_generation import AttentionGuidedQueryGeneration, GeneratedQueries, InjectTextQuery
from gresbox.blocks.text_selection import ScoreTextSelector
from gresbox.blocks.unet import UNetDecoder
from gresbox.blocks.word_fusion import PixelWordFusion

__all__ = [
    "MLP",
    "AdaptiveInstanceAggregation",
    "AlignmentAwareMasking",
    "AttentionGuidedQueryGeneration",
    "BoxHead",
    "CarisDecoder",
    "CarisLayer",
    "ConditionalPrompts",
    "DETRDecoder",
    "DecodedQueries",
    "DeformableAttention",
    "DeformableDecoder",
    "Detections",
    "DistScorePointSelector",
    "ExistenceHead",
    "FeedForward",
    "GatedObjectText",
    "GeneratedQueries",
    "GlobalMaskHead",
    "InjectTextQuery",
    "InstanceHead",
    "InstancePostprocess",
    "LearnedPrior",
    "MSDeformPixelDecoder",
    "MultiHeadAttention",
    "NoTargetHead",
    "ParallelObjectText",
    "PhraseObjectBlock",
    "PhraseObjectTransformer",
    "PixelWordFusion",
    "PointPrior",
    "RandomBlockMasking",
    "ScoreTextSelector",
    "SequentialObjectText",
    "SharedObjectText",
    "SimpleFeaturePyramid",
    "UNetDecoder",
    "attention_mask_logits",
    "cell_centres",
    "downsample_pixels",
    "inverse_sigmoid",
    "merge_masks",
    "sine_position",
    "sine_position_1d",
]
