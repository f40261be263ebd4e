"""InstAlign, composed of the library's blocks; its presets are the numbers at the end of this file.

Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from gresbox._checks import check_choice, check_float, check_range, check_shape
from gresbox.blocks import (
    AdaptiveInstanceAggregation,
    GatedObjectText,
    MSDeformPixelDecoder,
    NoTargetHead,
    ParallelObjectText,
    PhraseObjectTransformer,
    PixelWordFusion,
    SequentialObjectText,
    SharedObjectText,
)
from gresbox.losses import InstAlignCriterion, InstAlignWeights, MaskLoss
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.models.base import GresModel
from gresbox.models.encoders import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gresbox.models.processor import GresProcessor, word_tokenizer
from gresbox.models.vocabulary import WORDS
from gresbox.structures import GresOutput, Recipe

__all__ = ["INSTALIGN_SWIN_BASE", "INSTALIGN_SWIN_TINY", "INSTALIGN_TINY", "InstAlign", "InstAlignConfig"]

OBJECT_TEXT: dict[str, Callable[[int, int], nn.Module] | None] = {
    "parallel": ParallelObjectText,
    "shared": SharedObjectText,
    "sequential": SequentialObjectText,
    "gated": GatedObjectText,
    "none": None,
}


@dataclass(frozen=True)
class InstAlignConfig:
    """The numbers of an InstAlign model; the defaults are the paper's (Sec. 4.1) and, where it is silent, Mask2Former's.

    Args:
        image_encoder: The timm model.
        text_encoder: The transformers model.
        vocabulary: Words of a word-level tokenizer; empty: the tokenizer comes with the text encoder's pretrained weights.
        image_size: Side of the square that pictures are resized to.
        max_tokens: Longest expression in tokens, special tokens included.
        dim: Width ``C`` of queries, tokens and pixel features.
        num_queries: Object queries ``N`` (Table 3d: 20, 50, 100, 200).
        num_layers: Phrase-object blocks ``K``.
        num_heads: Attention heads.
        ffn_dim: Hidden width of the blocks' feed-forward layers.
        pixel_layers: Deformable encoder layers of the pixel decoder.
        pixel_ffn_dim: Their hidden width.
        memory_levels: How many of the pixel decoder's three levels the blocks read in turn, the finest ones. Small pictures leave
            nothing to see at stride 32.
        pixel_position: Add a sine table to the pixel features that masks are made of (ours; off in the paper-size presets).
        word_fusion: Let every pixel of the encoder's maps read the words before the pixel decoder (ours, after LAVT; off in the
            paper-size presets).
        fusion_position: Let the fused pixels know their places.
        object_text: ``"parallel"``, ``"shared"``, ``"sequential"``, ``"gated"`` or ``"none"`` (Table 3e: a decoder without text).
        text_queries: Start from the learned queries plus a map of the words' mean (VATEX) instead of the learned queries alone.
        literal_masks: Mask embeddings are the queries themselves (eq. 4 as printed) instead of a 3-layer MLP of them.
        score_prior: Relevance that every query starts with.
        aggregation: ``"prelu"`` (eq. 8), ``"noisy_or"`` or ``"select"`` (Table 3b: fixed selection).
        aggregation_prelu: Keep the PReLU of eq. 8 (Table 3b: without).
        slope: Initial slope of the PReLU.
        slope_per_query: One slope per query instead of one for all.
        aggregation_bias: Add a learnable scalar to the merged logits.
        no_target_inputs: ``"both"``, ``"global"``, ``"sentence"`` or ``"mean"`` (Table 3c).
        final_text: False leaves out the text side of the last block, for trainings that never read the last step's tokens:
            supervision without phrases together with ``no_target_inputs`` ``"global"`` or ``"mean"``.
        gradient_checkpointing: Recompute the blocks in the backward pass.
        mask_upsample: Factor by which instance masks are enlarged before they are compared with the truth, on all pixels.
        loss_weights: Weights of the criterion's terms.
        recipe: The training numbers.
    """

    image_encoder: ImageEncoderConfig = ImageEncoderConfig("swin_base_patch4_window12_384.ms_in22k", {"drop_path_rate": 0.3}, True)
    text_encoder: TextEncoderConfig = TextEncoderConfig(
        "roberta",
        {
            "vocab_size": 50265,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        "FacebookAI/roberta-base",
    )
    vocabulary: tuple[str, ...] = ()
    image_size: int = 480
    max_tokens: int = 20
    dim: int = 256
    num_queries: int = 100
    num_layers: int = 9
    num_heads: int = 8
    ffn_dim: int = 2048
    pixel_layers: int = 6
    pixel_ffn_dim: int = 1024
    memory_levels: int = 3
    pixel_position: bool = False
    word_fusion: bool = False
    fusion_position: bool = False
    object_text: str = "parallel"
    text_queries: bool = False
    literal_masks: bool = False
    score_prior: float = 0.01
    aggregation: str = "prelu"
    aggregation_prelu: bool = True
    slope: float = 0.25
    slope_per_query: bool = False
    aggregation_bias: bool = False
    no_target_inputs: str = "both"
    final_text: bool = True
    gradient_checkpointing: bool = False
    mask_upsample: int = 1
    loss_weights: InstAlignWeights = InstAlignWeights()
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        who = "InstAlignConfig"
        for name, kind in _NESTED.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{who}: `{name}` must be a {kind.__name__}, got {getattr(self, name)!r}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{who}: `{name}` must be a whole number, got {value!r}.")
            check_range(who, name, value, 0 if name == "pixel_layers" else 1, 3 if name == "memory_levels" else None)
        check_range(who, "max_tokens", self.max_tokens, 3)  # a word between the two special tokens
        if isinstance(self.vocabulary, str) or not all(isinstance(word, str) for word in self.vocabulary):
            raise TypeError(f"{who}: `vocabulary` must be words, got {type(self.vocabulary).__name__}.")
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"{who}: `dim` must be a multiple of 4 and of num_heads={self.num_heads}, got {self.dim}.")
        check_choice(who, "object_text", self.object_text, tuple(OBJECT_TEXT))


_NESTED = {
    "image_encoder": ImageEncoderConfig,
    "text_encoder": TextEncoderConfig,
    "loss_weights": InstAlignWeights,
    "recipe": Recipe,
}
_COUNTS = (
    "image_size",
    "max_tokens",
    "dim",
    "num_queries",
    "num_layers",
    "num_heads",
    "ffn_dim",
    "pixel_layers",
    "pixel_ffn_dim",
    "memory_levels",
    "mask_upsample",
)


class InstAlign(GresModel):
    r"""Instance-aware generalized referring expression segmentation.

    Encoders and a pixel decoder give multi-scale visual features :math:`V`, word features :math:`T_0`; ``K`` phrase-object blocks
    refine ``N`` queries and the words together; each step predicts instances; the last step's are aggregated into one mask, and a
    head says whether the expression refers to anything.

    Paper: Nguyen et al., arXiv:2411.15087, Sec. 3 and Fig. 2.
    Differs from the paper: nothing by default; what the paper leaves open is listed in the documentation's page "Papers".

    Args:
        config: The numbers.
        pretrained: Fetch the encoders' weights and the tokenizer (the only time that the network is used).

    Shape:
        - ``images``: ``(B, 3, S, S)`` normalised; ``input_ids``, ``attention_mask``: ``(B, L)``.
        - returns a :class:`gresbox.structures.GresOutput` with ``merged`` ``(B, S/4, S/4)``.

    Raises:
        ValueError: If an option of ``config`` is unknown or the inputs' shapes disagree.

    Example:
        >>> import torch
        >>> from gresbox import create_model
        >>> model = create_model("instalign_tiny").eval()
        >>> batch = model.processor([torch.zeros(3, 48, 64, dtype=torch.uint8)], ["the red circle"])
        >>> output = model(**batch)
        >>> output.merged.shape[0], tuple(output.no_target.shape)
        (1, (1,))
    """

    config_class = InstAlignConfig
    part_names = ("image_encoder", "text_encoder", "word_fusion", "pixel_decoder", "decoder", "aggregation", "no_target_head")

    def __init__(self, config: InstAlignConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        tokenizer: Any = word_tokenizer(config.vocabulary) if config.vocabulary else None
        if pretrained and tokenizer is None:
            tokenizer = _pretrained_tokenizer(config.text_encoder.pretrained)
        self.processor = GresProcessor(config.image_size, tokenizer, max_tokens=config.max_tokens)
        self.image_encoder = ImageEncoder(config.image_encoder, image_size=config.image_size, pretrained=pretrained)
        vocab_size = len(tokenizer) if config.vocabulary else None
        self.text_encoder = TextEncoder(config.text_encoder, config.dim, vocab_size=vocab_size, pretrained=pretrained)
        fusion = partial(PixelWordFusion, text_dim=config.dim, position=config.fusion_position)
        fusions = [fusion(channels) for channels in self.image_encoder.channels]
        self.word_fusion = nn.ModuleList(fusions) if config.word_fusion else None
        self.pixel_decoder = MSDeformPixelDecoder(
            self.image_encoder.channels,
            config.dim,
            num_layers=config.pixel_layers,
            num_heads=config.num_heads,
            ffn_dim=config.pixel_ffn_dim,
            pixel_position=config.pixel_position,
        )
        self.decoder = PhraseObjectTransformer(
            config.dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            num_queries=config.num_queries,
            num_levels=config.memory_levels,
            object_text=OBJECT_TEXT[config.object_text],
            mask_head=nn.Identity() if config.literal_masks else None,
            score_prior=config.score_prior,
            text_queries=config.text_queries,
            final_text=config.final_text,
            checkpoint=config.gradient_checkpointing,
        )
        self.aggregation = AdaptiveInstanceAggregation(
            slope=config.slope,
            num_queries=config.num_queries if config.slope_per_query else None,
            form=config.aggregation,
            prelu=config.aggregation_prelu,
            bias=config.aggregation_bias,
        )
        self.no_target_head = NoTargetHead(config.dim, inputs=config.no_target_inputs)
        self._finish()

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> GresOutput:
        check_shape("InstAlign", images=(images, "B 3 H W"), input_ids=(input_ids, "B L"), attention_mask=(attention_mask, "B L"))
        check_float("InstAlign", images=images)
        return self.answer(*self.features(images, input_ids, attention_mask))

    def features(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The first half of ``forward``, encoders and pixel decoder: memory levels, pixel features, tokens, ``valid``."""
        valid = attention_mask.bool()
        tokens = self.text_encoder(input_ids, valid)
        levels = self.image_encoder(images)
        if self.word_fusion is not None:
            levels = [fuse(level, tokens, valid) for fuse, level in zip(self.word_fusion, levels, strict=True)]
        pixels, memories = self.pixel_decoder(levels)
        return list(memories[-self.config.memory_levels :]), pixels, tokens, valid

    def answer(self, memories: Sequence[Tensor], pixels: Tensor, tokens: Tensor, valid: Tensor) -> GresOutput:
        """The second half of ``forward``, from :meth:`features` on; its shapes do not depend on the pictures."""
        *aux, last = self.decoder(memories, pixels, tokens, valid)
        queries = last.queries if last.normed is None else last.normed
        no_target = self.no_target_head(queries, last.score_logits.sigmoid(), last.tokens, valid)
        return GresOutput(self.aggregation(last), no_target, last, tuple(aux))

    def encode(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoders alone: stride-32 features ``(B, Cv, h, w)``, unprojected word features ``(B, L, Ct)``, ``valid``."""
        valid = attention_mask.bool()
        return self.image_encoder(images)[-1], self.text_encoder.encode(input_ids, valid), valid

    @property
    def encode_dims(self) -> tuple[int, int]:
        """Channels of the stride-32 features and of the word features."""
        return self.image_encoder.channels[-1], self.text_encoder.width

    def criterion(self, *, num_points: int | None = None, **options: Any) -> InstAlignCriterion:
        """The paper's loss (eq. 5-7, 9, 13); options go to :class:`gresbox.losses.InstAlignCriterion`.

        Args:
            num_points: Points per mask for matching and mask losses; None: dense at the masks' size, 12544: Mask2Former's way.
            **options: ``supervision``, ``weights`` (default: the config's) and the others of the criterion.
        """
        mask_loss = MaskLoss(upsample=self.config.mask_upsample) if num_points is None else MaskLoss(num_points)
        options = {"weights": self.config.loss_weights, "mask_loss": mask_loss, **options}
        phrase = 1.0 if options.get("supervision", "phrase") == "phrase" else 0.0
        matcher = HungarianInstanceMatcher(phrase=phrase, num_points=num_points)
        return InstAlignCriterion(matcher, **options)


def _pretrained_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


INSTALIGN_SWIN_BASE = InstAlignConfig()

INSTALIGN_SWIN_TINY = InstAlignConfig(
    image_encoder=ImageEncoderConfig("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", {"drop_path_rate": 0.2}, True)
)

INSTALIGN_TINY = InstAlignConfig(
    image_encoder=ImageEncoderConfig("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (32, 64, 96, 128)}),
    text_encoder=TextEncoderConfig(
        "bert",
        {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        dropout=0.0,
    ),
    vocabulary=WORDS,
    image_size=64,
    dim=64,
    num_queries=12,
    num_layers=3,
    num_heads=4,
    ffn_dim=128,
    pixel_layers=1,
    pixel_ffn_dim=128,
    pixel_position=True,
    word_fusion=True,
    fusion_position=True,
    text_queries=True,
    mask_upsample=2,
    loss_weights=InstAlignWeights(no_target=2.0, no_target_classes=(1.0, 6.5)),
    recipe=Recipe(lr=2e-3, final_lr=2e-5, epochs=1.44, clip=1.0, image_size=64, backbone_lr_scale=1.0, warmup=50),
)
"""For two CPU cores and minutes, from scratch. Beside its sizes it differs from the paper in what a short training from random
weights was seen to need: pixels that read the words and know their places, queries that start from the sentence, instance masks
compared at half the picture's size instead of a quarter, one learning rate for all parts, and a no-target weight of 2 (0.1 is lost
among the other terms for the first thousand steps) with 6.5 on the one sample in seven that has no target."""
