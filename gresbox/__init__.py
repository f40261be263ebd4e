"""gresbox: parts for generalised referring expression segmentation - segment many things, one, or nothing.

Everything public resolves from here, but lazily: importing gresbox imports torch alone. Functions live in their packages,
``gresbox.ops`` foremost.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gresbox.blocks import (
        MLP,
        AdaptiveInstanceAggregation,
        DeformableAttention,
        FeedForward,
        GatedObjectText,
        MSDeformPixelDecoder,
        MultiHeadAttention,
        NoTargetHead,
        ParallelObjectText,
        PhraseObjectBlock,
        PhraseObjectTransformer,
        SequentialObjectText,
        SharedObjectText,
    )
    from gresbox.data import Batch, GRefCOCO, Letterbox, Resize, SyntheticGRES
    from gresbox.losses import InstAlignCriterion, InstAlignWeights, MaskLoss, NoTargetLoss, POALoss
    from gresbox.matchers import HungarianInstanceMatcher
    from gresbox.metrics import GRESMetric
    from gresbox.models import (
        GresModel,
        GresProcessor,
        ImageEncoder,
        ImageEncoderConfig,
        InstAlign,
        InstAlignConfig,
        TextEncoder,
        TextEncoderConfig,
        create_model,
        list_models,
        load_model,
    )
    from gresbox.structures import GresOutput, GresPrediction, GresSample, GresTarget, InstancePrediction, Recipe
    from gresbox.training import EvaluationOptions, Trainer, TrainOptions

__version__ = "0.1.0.dev0"

_HOME = {
    "gresbox.structures": ["GresOutput", "GresPrediction", "GresSample", "GresTarget", "InstancePrediction", "Recipe"],
    "gresbox.blocks": [
        "AdaptiveInstanceAggregation",
        "DeformableAttention",
        "FeedForward",
        "GatedObjectText",
        "MLP",
        "MSDeformPixelDecoder",
        "MultiHeadAttention",
        "NoTargetHead",
        "ParallelObjectText",
        "PhraseObjectBlock",
        "PhraseObjectTransformer",
        "SequentialObjectText",
        "SharedObjectText",
    ],
    "gresbox.losses": ["InstAlignCriterion", "InstAlignWeights", "MaskLoss", "NoTargetLoss", "POALoss"],
    "gresbox.matchers": ["HungarianInstanceMatcher"],
    "gresbox.metrics": ["GRESMetric"],
    "gresbox.data": ["Batch", "GRefCOCO", "Letterbox", "Resize", "SyntheticGRES"],
    "gresbox.models": [
        "GresModel",
        "GresProcessor",
        "ImageEncoder",
        "ImageEncoderConfig",
        "InstAlign",
        "InstAlignConfig",
        "TextEncoder",
        "TextEncoderConfig",
        "create_model",
        "list_models",
        "load_model",
    ],
    "gresbox.training": ["EvaluationOptions", "TrainOptions", "Trainer"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdaptiveInstanceAggregation",
    "Batch",
    "DeformableAttention",
    "EvaluationOptions",
    "FeedForward",
    "GRESMetric",
    "GRefCOCO",
    "GatedObjectText",
    "GresModel",
    "GresOutput",
    "GresPrediction",
    "GresProcessor",
    "GresSample",
    "GresTarget",
    "HungarianInstanceMatcher",
    "ImageEncoder",
    "ImageEncoderConfig",
    "InstAlign",
    "InstAlignConfig",
    "InstAlignCriterion",
    "InstAlignWeights",
    "InstancePrediction",
    "Letterbox",
    "MLP",
    "MSDeformPixelDecoder",
    "MaskLoss",
    "MultiHeadAttention",
    "NoTargetHead",
    "NoTargetLoss",
    "POALoss",
    "ParallelObjectText",
    "PhraseObjectBlock",
    "PhraseObjectTransformer",
    "Recipe",
    "Resize",
    "SequentialObjectText",
    "SharedObjectText",
    "SyntheticGRES",
    "TextEncoder",
    "TextEncoderConfig",
    "TrainOptions",
    "Trainer",
    "__version__",
    "create_model",
    "list_models",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name's home when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gresbox' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
