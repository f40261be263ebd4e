"""CARIS, composed of the library's blocks; its presets are the numbers at the end of this file.

Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gresbox._checks import check_float, check_range, check_shape
from gresbox.blocks import CarisDecoder, ConditionalPrompts
from gresbox.losses import CarisCriterion
from gresbox.models import convert
from gresbox.models.base import GresModel
from gresbox.models.encoders import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gresbox.models.processor import GresProcessor, word_tokenizer
from gresbox.models.vocabulary import WORDS
from gresbox.structures import GresOutput, Recipe

__all__ = ["CARIS_SWIN_BASE", "CARIS_TINY", "Caris", "CarisConfig", "PromptedTextEncoder"]


@dataclass(frozen=True)
class CarisConfig:
    """The numbers of a CARIS model; the defaults are those of its released code, github.com/lsa1997/CARIS.

    Args:
        image_encoder: The timm model.
        text_encoder: The transformers model, one with BERT's parts: ``embeddings`` and ``encoder``.
        vocabulary: Words of a word-level tokenizer; empty: the tokenizer comes with the text encoder's pretrained weights.
        image_size: Side of the square that pictures are resized to.
        max_tokens: Longest expression in tokens, special tokens included.
        prompt_grids: Grids of cells whose means the text encoder reads along with the words: 1 x 1 and 2 x 2.
        dim: Width ``C`` of words and pixels in the decoder.
        num_layers: Vision-language layers.
        num_heads: Attention heads of the decoder.
        num_points: Points per head and level of the deformable attention.
        ffn_dim: Hidden width of the decoder's feed-forward layers.
        attention_dim: Width of the heads of a dense attention together.
        num_prompts: Learned prompts of the decoder, which speak for the background.
        class_weights: Weights of background and foreground in the loss.
        recipe: The training numbers.

    Raises:
        TypeError: If a field has another type.
        ValueError: If a number is out of range.
    """

    image_encoder: ImageEncoderConfig = ImageEncoderConfig("swin_base_patch4_window7_224.ms_in22k", {"drop_path_rate": 0.3}, True)
    text_encoder: TextEncoderConfig = TextEncoderConfig(
        "bert",
        {
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
        "google-bert/bert-base-uncased",
        dropout=0.0,
    )
    vocabulary: tuple[str, ...] = ()
    image_size: int = 448
    max_tokens: int = 20
    prompt_grids: tuple[int, ...] = (1, 2)
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    ffn_dim: int = 1024
    attention_dim: int = 1024
    num_prompts: int = 5
    class_weights: tuple[float, float] = (0.9, 1.1)
    recipe: Recipe = Recipe(
        schedule="poly",
        lr=1e-4,
        final_lr=0.0,
        epochs=50,
        batch=16,
        clip=1.0,
        image_size=448,
        amp="fp16",
        weight_decay=0.01,
        backbone_lr_scale=0.1,
        warmup=1500,
        power=0.9,
    )

    def __post_init__(self) -> None:
        who = "CarisConfig"
        for name, kind in _NESTED.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{who}: `{name}` must be a {kind.__name__}, got {getattr(self, name)!r}.")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{who}: `{name}` must be a whole number, got {value!r}.")
            check_range(who, name, value, 1)
        check_range(who, "max_tokens", self.max_tokens, 3)  # a word between the two special tokens
        if isinstance(self.vocabulary, str) or not all(isinstance(word, str) for word in self.vocabulary):
            raise TypeError(f"{who}: `vocabulary` must be words, got {type(self.vocabulary).__name__}.")
        if self.dim % 4:
            raise ValueError(f"{who}: `dim` must be a multiple of 4, got {self.dim}.")
        for name in ("dim", "attention_dim"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(f"{who}: `{name}` must be a multiple of num_heads={self.num_heads}, got {getattr(self, name)}.")


_NESTED = {
    "image_encoder": ImageEncoderConfig,
    "text_encoder": TextEncoderConfig,
    "prompt_grids": tuple,
    "class_weights": tuple,
    "recipe": Recipe,
}
_COUNTS = (
    "image_size",
    "max_tokens",
    "dim",
    "num_layers",
    "num_heads",
    "num_points",
    "ffn_dim",
    "attention_dim",
    "num_prompts",
)


class PromptedTextEncoder(TextEncoder):
    r"""Word features of a transformers model that reads the picture too.

    .. math:: [T;\; \cdot\,] = \mathrm{encoder}([\mathrm{embed}(\mathrm{words});\; \mathrm{prompts}(F)])

    The conditional prompts stand behind the words, skip the embedding layer with its positions and its norm, and are cut off again.

    Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117.
    Differs from the paper: nothing.

    Args:
        config: The transformers model, one with BERT's parts: ``embeddings`` and ``encoder``.
        dim: Width ``C`` of the projected tokens.
        visual_dim: Channels ``Cv`` of the feature map that the prompts are made of.
        grids: Cells per side of each grid of prompts.
        vocab_size: Overrides the configuration's vocabulary size.
        pretrained: Fetch the weights (the only time that this class uses the network).

    Shape:
        - ``input_ids``, ``valid``: ``(B, L)``; ``visual``: ``(B, Cv, h, w)``; returns ``(B, L, C)``.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> numbers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> encoder = PromptedTextEncoder(TextEncoderConfig("bert", numbers), 8, visual_dim=12, vocab_size=30)
        >>> ids, valid = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
        >>> tuple(encoder(ids, valid, torch.randn(2, 12, 7, 7)).shape)
        (2, 5, 8)
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        dim: int,
        *,
        visual_dim: int,
        grids: Sequence[int] = (1, 2),
        vocab_size: int | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__(config, dim, vocab_size=vocab_size, pretrained=pretrained)
        self.prompts = ConditionalPrompts(visual_dim, self.width, grids=grids)

    def encode(self, input_ids: Tensor, valid: Tensor, visual: Tensor | None = None) -> Tensor:
        """The transformers model's last hidden states of the words, ``(B, L, width)``, before the projection."""
        if visual is None:
            return super().encode(input_ids, valid)
        from transformers.masking_utils import create_bidirectional_mask

        check_shape("PromptedTextEncoder", input_ids=(input_ids, "B L"), valid=(valid, "B L"), visual=(visual, "B * * *"))
        prompts = self.prompts(visual)
        states = torch.cat([self.body.embeddings(input_ids=input_ids), prompts], dim=1)
        readable = torch.cat([valid.bool(), valid.new_ones(prompts.shape[:2], dtype=torch.bool)], dim=1)
        allowed = create_bidirectional_mask(self.body.config, states, readable)
        return self.body.encoder(states, attention_mask=allowed).last_hidden_state[:, : input_ids.shape[1]]

    def forward(self, input_ids: Tensor, valid: Tensor, visual: Tensor | None = None) -> Tensor:
        return self.project(self.encode(input_ids, valid, visual))


class Caris(GresModel):
    r"""Context-aware referring image segmentation: one mask per expression, no instances.

    The picture's coarsest features become prompts that the text encoder reads with the words; the decoder lets words and pixels
    read each other and asks every pixel whether it is nearer to ``[CLS]`` or to the background's prompts.

    Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117, as its
    released code has it.
    Differs from that code: what the blocks' docstrings say, and what the documentation's page "Papers" lists. It knows no
    no-target expression; here an empty mask is the answer "nothing", and such samples may be trained on as background.

    Args:
        config: The numbers.
        pretrained: Fetch the encoders' weights and the tokenizer (the only time that the network is used).

    Shape:
        - ``images``: ``(B, 3, S, S)`` normalised; ``input_ids``, ``attention_mask``: ``(B, L)``.
        - returns a :class:`gresbox.structures.GresOutput` with ``merged`` ``(B, S/4, S/4)``, resized with aligned corners.

    Raises:
        ValueError: If the inputs' shapes disagree.

    Example:
        >>> from gresbox import create_model
        >>> model = create_model("caris_tiny").eval()
        >>> batch = model.processor([torch.zeros(3, 48, 64, dtype=torch.uint8)], ["the red circle"])
        >>> output = model(**batch)
        >>> tuple(output.merged.shape), output.no_target
        ((1, 16, 16), None)
    """

    config_class = CarisConfig
    part_names = ("image_encoder", "text_encoder", "decoder")

    def __init__(self, config: CarisConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        tokenizer: Any = word_tokenizer(config.vocabulary) if config.vocabulary else None
        if pretrained and tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(config.text_encoder.pretrained)
        self.processor = GresProcessor(config.image_size, tokenizer, max_tokens=config.max_tokens)
        self.image_encoder = ImageEncoder(config.image_encoder, image_size=config.image_size, pretrained=pretrained)
        self.text_encoder = PromptedTextEncoder(
            config.text_encoder,
            config.dim,
            visual_dim=self.image_encoder.channels[-1],
            grids=config.prompt_grids,
            vocab_size=len(tokenizer) if config.vocabulary else None,
            pretrained=pretrained,
        )
        self.decoder = CarisDecoder(
            self.image_encoder.channels,
            config.dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_points=config.num_points,
            ffn_dim=config.ffn_dim,
            attention_dim=config.attention_dim,
            num_prompts=config.num_prompts,
        )
        self._finish()

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> GresOutput:
        check_shape("Caris", images=(images, "B 3 H W"), input_ids=(input_ids, "B L"), attention_mask=(attention_mask, "B L"))
        check_float("Caris", images=images)
        valid = attention_mask.bool()
        features = self.image_encoder(images)
        tokens = self.text_encoder(input_ids, valid, features[-1])
        return GresOutput(self.decoder(features, tokens, valid), align_corners=True)

    def encode(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoders alone: stride-32 features ``(B, Cv, h, w)``, unprojected word features ``(B, L, Ct)``, ``valid``.

        The words have read the picture's prompts.
        """
        valid = attention_mask.bool()
        visual = self.image_encoder(images)[-1]
        return visual, self.text_encoder.encode(input_ids, valid, visual), valid

    @property
    def encode_dims(self) -> tuple[int, int]:
        """Channels of the stride-32 features and of the word features."""
        return self.image_encoder.channels[-1], self.text_encoder.width

    def criterion(self, **options: Any) -> CarisCriterion:
        """The released code's loss; options go to :class:`gresbox.losses.CarisCriterion`.

        Args:
            **options: ``class_weights`` (default: the config's) and ``reduction``.
        """
        return CarisCriterion(**{"class_weights": self.config.class_weights, **options})

    def load_released(self, state_dict: Mapping[str, Any]) -> None:
        """Load the weights of a file of the released code, github.com/lsa1997/CARIS.

        Args:
            state_dict: What the file holds, or the parameters under its key ``"model"``.

        Raises:
            ValueError: If a parameter is missing, unknown or of another shape; nothing is loaded then.
            TypeError: If a parameter is not a tensor.
        """
        weights = convert.caris(state_dict)
        convert.check_fits("Caris.load_released", weights, self.state_dict())
        self.load_state_dict(weights)


CARIS_SWIN_BASE = CarisConfig()

CARIS_TINY = CarisConfig(
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
    num_layers=2,
    num_heads=4,
    num_points=2,
    ffn_dim=128,
    attention_dim=64,
    recipe=Recipe(
        schedule="poly",
        lr=2e-3,
        final_lr=0.0,
        epochs=1.6,
        clip=1.0,
        image_size=64,
        weight_decay=0.01,
        backbone_lr_scale=1.0,
        warmup=50,
    ),
)
"""For two CPU cores and minutes, from scratch: small parts, one learning rate for all, no drop path, no dropout."""
