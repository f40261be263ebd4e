"""Neural network modules: every one works alone and combines with the others."""

from __future__ import annotations

from gresbox.blocks.attention import MultiHeadAttention
from gresbox.blocks.deformable_attention import DeformableAttention
from gresbox.blocks.heads import MLP, FeedForward
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
from gresbox.blocks.position import sine_position, sine_position_1d

__all__ = [
    "MLP",
    "AdaptiveInstanceAggregation",
    "DeformableAttention",
    "FeedForward",
    "GatedObjectText",
    "MSDeformPixelDecoder",
    "MultiHeadAttention",
    "NoTargetHead",
    "ParallelObjectText",
    "PhraseObjectBlock",
    "PhraseObjectTransformer",
    "SequentialObjectText",
    "SharedObjectText",
    "attention_mask_logits",
    "downsample_pixels",
    "sine_position",
    "sine_position_1d",
]
