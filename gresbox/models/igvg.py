"""IGVG, composed of the library's blocks; its presets are the numbers at the end of this file.

Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG); released code: Dmmm1997/InstanceVG, arXiv:2509.13747.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice, check_float, check_range, check_shape
from gresbox.blocks import (
    MLP,
    AttentionGuidedQueryGeneration,
    DeformableDecoder,
    Detections,
    DETRDecoder,
    DistScorePointSelector,
    ExistenceHead,
    GlobalMaskHead,
    InstanceHead,
    InstancePostprocess,
    LearnedPrior,
    PointPrior,
    ScoreTextSelector,
    SimpleFeaturePyramid,
    UNetDecoder,
)
from gresbox.losses import IGVGCriterion, IGVGWeights, MaskLoss
from gresbox.matchers import PointGuidedMatcher
from gresbox.models import convert
from gresbox.models.base import GresModel
from gresbox.models.beit3 import (
    BEIT3_BASE,
    BEIT3_LARGE,
    BEIT3_TINY,
    PUBLIC_FILES,
    Beit3Config,
    Beit3Encoder,
    beit3_tokenizer,
    fetch_file,
    resize_position,
)
from gresbox.models.processor import GresProcessor, word_tokenizer
from gresbox.models.vocabulary import WORDS
from gresbox.structures import GresOutput, GresPrediction, InstancePrediction, Recipe

__all__ = ["IGVG", "IGVG_BEIT3_BASE", "IGVG_BEIT3_LARGE", "IGVG_TINY", "RELEASED", "IGVGConfig"]

RELEASED: dict[str, Any] = {"text_score": "mean", "pooling": "max", "reference": "shifted", "aux_layers": "official"}
"""Where the released code differs from the paper: ``create_model("igvg_beit3_base", **RELEASED)`` is the model of its files."""


@dataclass(frozen=True)
class IGVGConfig:
    """The numbers of an IGVG model; the defaults are the paper's and, where it is silent, those of its released code.

    A loss weight of 0 is a switch: what only that loss would train is not built (Table 8).

    Args:
        encoder: The BEiT-3 encoder; its ``drop_path`` is the paper's 0.1 in the base model.
        pretrained: URL or path of the encoder's weights that ``pretrained=True`` reads; empty: there are none.
        tokenizer: URL or path of the sentencepiece model that ``pretrained=True`` reads.
        vocabulary: Words of a word-level tokenizer; empty: the tokenizer is BEiT-3's.
        image_size: Side of the square that pictures are resized to, a multiple of the patch.
        max_tokens: Longest expression in tokens, special tokens included (RefCOCO: 20).
        dim: Width ``C`` of queries, tokens and pixel features.
        num_queries: Queries ``N`` (RefCOCO: 1).
        text_selection: Choose ``N`` words that attend to the picture (Table 6: STS); False: all do, without ``inject_text``.
        text_score: ``"l2"``, as in the paper, or ``"mean"``, as in its code.
        distance_weight: Weight of the distance in the choice of points; 0: the highest scores (Table 6 without DSPS).
        inject_text: Queries start from words and points (Table 6: ITQ) instead of from the points' features alone.
        pooling: ``"mean"`` of the words' attention, as in the paper, or ``"max"``, as in its code.
        minimap: ``"probs"``: attention, taken by its loss as a logit, as in the code; ``"logits"`` (ours): the same before softmax.
        minimap_resize: ``"nearest"`` or ``"area"``: how the minimap's truth is made.
        attention_ffn_dim: Width of the feed-forward layer that follows the words' attention.
        pyramid_scales: Resolution of the levels relative to the patches; masks have that of the first.
        unet_norm: ``"batch"``, as in the code, or ``"group"``, which does not see the rest of the batch.
        decoder: ``"points"``, ``"multi_scale"``, ``"single_scale"`` (both with learned priors) or ``"detr"`` (Table 7).
        reference: Reference points: ``"points"``, the prior ones, or ``"shifted"``, as in the code; read by ``decoder="points"``.
        num_layers: Decoder layers.
        num_heads: Attention heads.
        num_points: Points per head and level of the deformable attention.
        ffn_dim: Hidden width of the decoder's feed-forward layers.
        dropout: Share of values that the query generation and the decoder drop in training.
        mask_layers: Layers of a perceptron on the queries before they multiply the pixels (ours); 0: none, as in the paper.
        mask_upsample: Factor by which instance masks are enlarged before they are compared with the truth; 0: to the picture's
            size, with aligned corners, as in the code. Another factor (ours) does without aligned corners everywhere.
        existence: ``"two_class"``, the code's cross-entropy, or ``"bce"``, as in the paper.
        aux_layers: Losses of the earlier decoder layers: ``"uniform"``, ``"official"`` or ``"none"``.
        score_threshold: Instances are kept above this score; without any the answer is "nothing".
        loss_weights: Weights of the criterion's terms.
        recipe: The training numbers.

    Raises:
        TypeError: If a field has another type.
        ValueError: If a number is out of range, or nothing would train a part.
    """

    encoder: Beit3Config = BEIT3_BASE
    pretrained: str = PUBLIC_FILES + "beit3_base_patch16_224.pth"
    tokenizer: str = PUBLIC_FILES + "beit3.spm"
    vocabulary: tuple[str, ...] = ()
    image_size: int = 320
    max_tokens: int = 50
    dim: int = 256
    num_queries: int = 10
    text_selection: bool = True
    text_score: str = "l2"
    distance_weight: float = 0.003
    inject_text: bool = True
    pooling: str = "mean"
    minimap: str = "probs"
    minimap_resize: str = "nearest"
    attention_ffn_dim: int = 512
    pyramid_scales: tuple[float, ...] = (4, 2, 1, 0.5)
    unet_norm: str = "batch"
    decoder: str = "points"
    reference: str = "points"
    num_layers: int = 3
    num_heads: int = 8
    num_points: int = 4
    ffn_dim: int = 1024
    dropout: float = 0.1
    mask_layers: int = 0
    mask_upsample: int = 0
    existence: str = "two_class"
    aux_layers: str = "uniform"
    score_threshold: float = 0.7
    loss_weights: IGVGWeights = IGVGWeights()
    recipe: Recipe = Recipe(
        optimizer="adam",
        schedule="step",
        lr=5e-4,
        epochs=10,
        batch=16,
        clip=0.15,
        image_size=320,
        weight_decay=0.0,
        backbone_lr_scale=0.1,
        milestones=(0.6,),
        betas=(0.9, 0.98),
        eps=1e-9,
        amsgrad=True,
    )

    def __post_init__(self) -> None:
        who = "IGVGConfig"
        for name, kind in _NESTED.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{who}: `{name}` must be a {kind.__name__}, got {getattr(self, name)!r}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{who}: `{name}` must be a whole number, got {value!r}.")
            check_range(who, name, value, least)
        for name, choices in _CHOICES.items():
            check_choice(who, name, getattr(self, name), choices)
        for name in ("dropout", "score_threshold"):
            check_range(who, name, getattr(self, name), 0, 1)
        if not all(isinstance(word, str) for word in self.vocabulary):
            raise TypeError(f"{who}: `vocabulary` must be words, got others.")
        groups = 8 if self.unet_norm == "group" else 4
        if self.dim % self.num_heads or self.dim % groups:
            raise ValueError(f"{who}: `dim` must be a multiple of {groups} and of num_heads={self.num_heads}, got {self.dim}.")
        self._check_encoder(who)
        self._check_training(who)

    def _check_encoder(self, who: str) -> None:
        """The encoder reads pictures and texts of these sizes, and its words are read."""
        check_range(who, "max_tokens", self.max_tokens, 3, self.encoder.text_positions)  # a word between two special tokens
        if self.image_size % self.encoder.patch_size:
            multiple = f"a multiple of encoder.patch_size={self.encoder.patch_size}"
            raise ValueError(f"{who}: `image_size` must be {multiple}, got {self.image_size}.")
        check_range(who, "num_queries", self.num_queries, 1, (self.image_size // self.encoder.patch_size) ** 2)
        if not self.encoder.final_text:
            raise ValueError(f"{who}: `encoder.final_text` must be True, because the words are read, got False.")
        if 1 not in self.pyramid_scales:
            raise ValueError(f"{who}: `pyramid_scales` must hold 1, the patches' own resolution, got {self.pyramid_scales}.")

    def _check_training(self, who: str) -> None:
        """Every part has a loss that trains it."""
        weights = self.loss_weights
        if self.inject_text and not self.text_selection:
            raise ValueError(f"{who}: `inject_text` must be False without text_selection, which pairs words and points, got True.")
        if not self.inject_text and not weights.minimap:
            because = "because nothing else trains the words' attention"
            raise ValueError(f"{who}: `loss_weights.minimap` must be above 0 without inject_text, {because}, got 0.")
        if not (weights.detection and weights.cls and (weights.box or weights.giou)):
            raise ValueError(f"{who}: `loss_weights` must be above 0 for detection, its classes and its boxes, got {weights}.")
        if not (weights.merged or weights.instance):
            raise ValueError(f"{who}: `loss_weights` must be above 0 for merged or instance masks, got 0 for both.")


_NESTED = {
    "encoder": Beit3Config,
    "pretrained": str,
    "tokenizer": str,
    "vocabulary": tuple,
    "pyramid_scales": tuple,
    "loss_weights": IGVGWeights,
    "recipe": Recipe,
}
_COUNTS = {
    "image_size": 1,
    "max_tokens": 1,
    "dim": 1,
    "num_queries": 1,
    "attention_ffn_dim": 1,
    "num_layers": 1,
    "num_heads": 1,
    "num_points": 1,
    "ffn_dim": 1,
    "mask_layers": 0,
    "mask_upsample": 0,
}
_CHOICES = {
    "unet_norm": ("batch", "group"),
    "decoder": ("points", "multi_scale", "single_scale", "detr"),
    "existence": ("two_class", "bce"),
    "aux_layers": ("uniform", "official", "none"),
    "minimap_resize": ("nearest", "area"),
}


class IGVG(GresModel):
    r"""Instance-aware generalized visual grounding: points, boxes, instance masks and a global mask from one model.

    BEiT-3 encodes picture and words together; the words' attention chooses ``N`` points, where queries start; a deformable decoder
    refines them around their points; each query gives a score, a box and, times the global features :math:`S_{global}`, a mask;
    :math:`S_{global}` also gives one mask of everything and says whether there is anything.

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3 and Fig. 2; ``RELEASED`` holds the options with
    which it is the model of the released code, arXiv:2509.13747.
    Differs from the paper: existence has two classes, as in the code; the documentation's page "Papers" lists all that differs.

    Args:
        config: The numbers.
        pretrained: Fetch BEiT-3's weights and its tokenizer (the only time that the network is used).

    Shape:
        - ``images``: ``(B, 3, H, W)`` normalised, sides multiples of the patch; ``input_ids``, ``attention_mask``: ``(B, L)``.
        - returns a :class:`gresbox.structures.GresOutput`: ``merged`` ``(B, H/4, W/4)``, resized with aligned corners;
          ``instances`` and ``aux``, one per decoder layer, with boxes and points; ``extras`` ``"minimap"`` ``(B, H/16, W/16)`` and
          ``"existence"`` ``(B, 2)``; the factors follow the patch and ``pyramid_scales``.

    Raises:
        ValueError: If the inputs' shapes disagree or do not fit the patches.

    Example:
        >>> from gresbox import create_model
        >>> model = create_model("igvg_tiny").eval()
        >>> batch = model.processor([torch.zeros(3, 48, 64, dtype=torch.uint8)], ["the red circle"])
        >>> output = model(**batch)
        >>> tuple(output.boxes.shape), tuple(output.points.shape), sorted(output.extras)
        ((1, 10, 4), (1, 10, 2), ['existence', 'minimap'])
    """

    config_class = IGVGConfig
    part_names = (
        *("encoder", "image_projection", "text_projection", "pyramid", "query_generation", "decoder", "unet"),
        *("instance_head", "global_mask_head", "existence_head"),
    )
    encoder_names = ("encoder",)

    def __init__(self, config: IGVGConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        tokenizer: Any = word_tokenizer(config.vocabulary) if config.vocabulary else None
        if pretrained and tokenizer is None:
            tokenizer = beit3_tokenizer(fetch_file(config.tokenizer))
        self.processor = GresProcessor(config.image_size, tokenizer, max_tokens=config.max_tokens)
        vocab_size = len(tokenizer) if config.vocabulary else None
        self.encoder = Beit3Encoder(config.encoder, image_size=config.image_size, vocab_size=vocab_size)
        if pretrained and config.pretrained:
            self.encoder.load_beit3(torch.load(fetch_file(config.pretrained), map_location="cpu", weights_only=True))
        dim, weights = config.dim, config.loss_weights
        self.image_projection = nn.Conv2d(config.encoder.dim, dim, 1, bias=False)
        self.text_projection = nn.Linear(config.encoder.dim, dim, bias=False)
        self.query_generation = AttentionGuidedQueryGeneration(
            dim,
            config.num_queries,
            text_selector=partial(ScoreTextSelector, score=config.text_score) if config.text_selection else None,
            point_selector=partial(DistScorePointSelector, distance_weight=config.distance_weight),
            inject_text=config.inject_text,
            pooling=config.pooling,
            minimap=config.minimap,
            num_heads=config.num_heads,
            ffn_dim=config.attention_ffn_dim,
            dropout=config.dropout,
        )
        self.pyramid = SimpleFeaturePyramid(dim, dim, scales=config.pyramid_scales)
        self.decoder = _decoder(config)
        norm = nn.BatchNorm2d if config.unet_norm == "batch" else partial(nn.GroupNorm, 8)
        self.unet = UNetDecoder(dim, num_levels=len(config.pyramid_scales), norm=norm)
        # Without a loss on instance masks nothing would train a perceptron for them.
        layers = config.mask_layers if weights.instance else 0
        self.instance_head = InstanceHead(dim, mask_head=MLP(dim, dim, dim, num_layers=layers) if layers else None)
        self.global_mask_head = GlobalMaskHead(dim) if weights.merged else None
        self.existence_head = ExistenceHead(dim) if weights.existence else None
        self._finish()

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> GresOutput:
        check_shape("IGVG", images=(images, "B 3 H W"), input_ids=(input_ids, "B L"), attention_mask=(attention_mask, "B L"))
        check_float("IGVG", images=images)
        visual, words, valid = self.encode(images, input_ids, attention_mask)
        features, tokens = self.image_projection(visual), self.text_projection(words)
        generated = self.query_generation(tokens, features, valid)
        levels = self.pyramid(features)
        read = levels
        if self.config.decoder in ("single_scale", "detr"):
            read = [levels[self.config.pyramid_scales.index(1)]]
        steps, reference = self.decoder(generated.queries, generated.points, read)
        pixels = self.unet(levels)
        *aux, last = self.instance_head(steps, pixels, tokens, valid, points=generated.points, reference=reference)
        extras = {"minimap": generated.minimap}
        no_target = None
        if self.existence_head is not None:
            extras["existence"] = self.existence_head(pixels)
            no_target = ExistenceHead.no_target(extras["existence"])
        merged = union_logits(last) if self.global_mask_head is None else self.global_mask_head(pixels)
        return GresOutput(merged, no_target, last, tuple(aux), align_corners=not self.config.mask_upsample, extras=extras)

    def encode(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The joint encoder alone: patches ``(B, Cv, h, w)`` that have read the words, words ``(B, L, Cv)`` that have read the
        picture, ``valid``.
        """
        valid = attention_mask.bool()
        visual, words = self.encoder(images, input_ids, valid)
        return visual, words, valid

    @property
    def encode_dims(self) -> tuple[int, int]:
        """Channels of the patches and of the words: the same."""
        return self.encoder.width, self.encoder.width

    def criterion(self, *, matcher: nn.Module | None = None, **options: Any) -> IGVGCriterion:
        """The paper's loss; options go to :class:`gresbox.losses.IGVGCriterion`.

        Args:
            matcher: Default: :class:`gresbox.matchers.PointGuidedMatcher` with the paper's weights.
            **options: ``weights``, ``aux_layers``, ``existence``, ``minimap_resize`` (default: the config's) and the others of the
                criterion. A weight of 0 for what the config builds leaves that part without a gradient: set it in the config.
        """
        chosen = {name: getattr(self.config, name) for name in ("aux_layers", "existence", "minimap_resize")}
        if self.config.mask_upsample:
            chosen |= {"full_size": False, "mask_loss": MaskLoss(upsample=self.config.mask_upsample)}
        options = {"weights": self.config.loss_weights, **chosen, **options}
        return IGVGCriterion(PointGuidedMatcher() if matcher is None else matcher, **options)

    def postprocess(
        self,
        output: GresOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        texts: Sequence[str] | None = None,
        no_target_threshold: float = 0.5,
        score_threshold: float | None = None,
        instances: bool = True,
        **options: Any,
    ) -> list[GresPrediction]:
        r"""Turn the model's output into answers at the pictures' own sizes, by :class:`gresbox.blocks.InstancePostprocess`.

        The probability of "nothing" follows from the highest score :math:`s` and the score threshold :math:`\tau`: its odds are
        :math:`\frac{1 - s}{s} \cdot \frac{\tau}{1 - \tau}`, so that it is above one half exactly where no query is kept, which is
        the released code's rule.

        Args:
            output: What ``forward`` returned.
            sizes: Height and width of each picture.
            texts: The expressions.
            no_target_threshold: The answer is "nothing" above this probability; in [0, 1].
            score_threshold: Instances are kept above this score; default: the config's.
            instances: Return the instances; without them only the merged mask.
            **options: Further ones of the block: ``union``, ``nms_iou``, ``mask_threshold``, ``existence``, ``blank``.

        Returns:
            One prediction per picture, with the boxes and prior points of its instances. Where the answer is "nothing", the mask is
            empty and there are no instances.
        """
        check_range("postprocess", "no_target_threshold", no_target_threshold, 0, 1)
        threshold = self.config.score_threshold if score_threshold is None else score_threshold
        block = self._answers(score_threshold=threshold, no_target_threshold=no_target_threshold, **options)
        best = [found.scores[:1].sum() for found in block.detect(output, sizes)]  # 0 where every box is empty
        sure = math.log(max(threshold, 1e-6)) - math.log(max(1 - threshold, 1e-6))
        nothing = sure - torch.logit(torch.stack(best), eps=1e-6)
        answers = block(dataclasses.replace(output, no_target=nothing), sizes, texts)
        return answers if instances else [_without_instances(answer) for answer in answers]

    def detect(self, output: GresOutput, sizes: Sequence[tuple[int, int]], **options: Any) -> list[Detections]:
        """Boxes of all queries with their scores, whatever these are: what :class:`gresbox.metrics.GRECMetric` thresholds itself.

        Args:
            output: What ``forward`` returned.
            sizes: Height and width of each picture.
            **options: Those of :class:`gresbox.blocks.InstancePostprocess`.

        Returns:
            For each picture scores, highest first, boxes in pixels and queries; ``found._asdict()`` is the metric's form.
        """
        return self._answers(**options).detect(output, sizes)

    def load_released(self, state_dict: Mapping[str, Any]) -> None:
        """Load the weights of a file of the released code, ``InstanceVG-*.pth``, into a model with the options ``RELEASED``.

        Args:
            state_dict: What the file holds, or the parameters under its key ``"state_dict"``. The position table of the patches is
                resized to this model's pictures.

        Raises:
            ValueError: If the config's options are others, or a parameter is missing, unknown or of another shape; nothing is
                loaded then.
            TypeError: If a parameter is not a tensor.
        """
        wrong = [name for name in ("text_score", "pooling", "reference") if getattr(self.config, name) != RELEASED[name]]
        if wrong:
            name = wrong[0]
            got = f"{getattr(self.config, name)!r}; create_model(name, **RELEASED) has all that differs"
            raise ValueError(f"IGVG.load_released: `config.{name}` must be {RELEASED[name]!r}, as in the released code, got {got}.")
        weights: dict[str, Tensor] = convert.instancevg(state_dict)
        table = weights["encoder.visual_position"]
        side = math.isqrt(len(table) - 1)
        if 1 + side**2 == len(table):
            weights["encoder.visual_position"] = resize_position(table, (side, side), self.encoder.grid)
        convert.check_fits("IGVG.load_released", weights, self.state_dict())
        self.load_state_dict(weights)

    def _answers(self, **options: Any) -> InstancePostprocess:
        """The post-processing for what this config trains."""
        weights = self.config.loss_weights
        union = "merge" if weights.merged and weights.instance else "global" if weights.merged else "instance"
        existence = "sigmoid" if weights.existence else "none"
        defaults = {"score_threshold": self.config.score_threshold, "union": union, "existence": existence}
        return InstancePostprocess(**{**defaults, **options})


def union_logits(step: InstancePrediction) -> Tensor:
    """One mask of all instances, ``(B, h, w)`` logits: of the surest query that is both relevant and there."""
    return torch.minimum(step.masks, step.score_logits.float()[..., None, None]).amax(1)


def _decoder(config: IGVGConfig) -> nn.Module:
    """The decoder of a row of Table 7."""
    sizes: dict[str, Any] = {name: getattr(config, name) for name in ("num_layers", "num_heads", "ffn_dim", "dropout")}
    if config.decoder == "detr":
        return DETRDecoder(config.dim, config.num_queries, **sizes)
    points = config.decoder == "points"
    prior = PointPrior(config.dim, reference=config.reference) if points else LearnedPrior(config.dim, config.num_queries)
    levels = 1 if config.decoder == "single_scale" else len(config.pyramid_scales)
    return DeformableDecoder(config.dim, prior=prior, num_levels=levels, num_points=config.num_points, **sizes)


def _without_instances(answer: GresPrediction) -> GresPrediction:
    empty = {name: getattr(answer, name)[:0] for name in ("scores", "instance_masks", "boxes_xyxy")}
    return dataclasses.replace(answer, **empty, points=None)


IGVG_BEIT3_BASE = IGVGConfig()

IGVG_BEIT3_LARGE = IGVGConfig(
    encoder=BEIT3_LARGE,
    pretrained=PUBLIC_FILES + "beit3_large_patch16_224.pth",
    recipe=dataclasses.replace(IGVG_BEIT3_BASE.recipe, batch=4),
)
"""The released code has it for RefCOCO alone, with batches of 4 on each GPU; everything but the encoder is the base model's."""

IGVG_TINY = IGVGConfig(
    encoder=BEIT3_TINY,
    pretrained="",
    tokenizer="",
    vocabulary=WORDS,
    image_size=64,
    max_tokens=50,
    dim=48,
    distance_weight=0.1,
    minimap="logits",
    minimap_resize="area",
    attention_ffn_dim=128,
    pyramid_scales=(1, 0.5),
    unet_norm="group",
    num_layers=2,
    num_heads=4,
    num_points=2,
    ffn_dim=128,
    dropout=0.0,
    mask_layers=3,
    mask_upsample=2,
    existence="bce",
    score_threshold=0.55,
    loss_weights=IGVGWeights(detection=0.5, minimap=0.5, existence=1.0, no_object=0.4),
    recipe=Recipe(lr=1.2e-3, final_lr=1e-5, epochs=1.2, clip=1.0, image_size=64, backbone_lr_scale=1.0, warmup=50),
)
