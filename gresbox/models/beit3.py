"""The BEiT-3 multi-modality encoder: a picture and its expression read each other in every layer. Sizes are plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as run_checkpointed

from gresbox._checks import check_choice, check_float, check_range, check_shape
from gresbox.blocks import PixelWordFusion
from gresbox.models import convert
from gresbox.models._stem import ConvStem

__all__ = [
    "BEIT3_BASE",
    "BEIT3_LARGE",
    "BEIT3_TINY",
    "PUBLIC_FILES",
    "Beit3Config",
    "Beit3Encoder",
    "beit3_tokenizer",
    "fetch_file",
    "resize_position",
]

PUBLIC_FILES = "https://github.com/addf400/files/releases/download/beit3/"
"""Where the authors of BEiT-3 keep its weights and ``beit3.spm``."""


@dataclass(frozen=True)
class Beit3Config:
    """The numbers of a BEiT-3 encoder; the defaults are those of the public base model.

    Args:
        dim: Width ``C``.
        num_layers: Layers.
        num_heads: Attention heads.
        ffn_dim: Hidden width of the feed-forward networks.
        patch_size: Side of a patch in pixels: the stride of the visual features.
        stem: ``"patch"``: one linear map of each patch, as in the paper; ``"conv"`` (ours): a small residual network of that
            stride, which learns shapes from random weights in a fraction of the steps. Public weights fit ``"patch"`` alone.
        word_fusion: Patches also read the words once before the first layer, gated and with their places
            (:class:`gresbox.blocks.PixelWordFusion`; ours). Public weights fit False alone.
        vocab_size: Rows of the word table.
        text_positions: Longest text in tokens.
        drop_path: Probability that the last layer's update is left out for a sample in training; it grows linearly from 0 in the
            first layer.
        start_std: Standard deviation of the tables of words and places before training; None: ``dim ** -0.5`` and 0.02, as in the
            public code, which a short training can hardly tell from the layers' first updates: Sub-LN makes these of size one.
        update_scale: Factor on the starting weights of what each layer adds to its input; below 1 (ours) the words and pixels
            themselves are not drowned before the first layers have learned anything.
        final_text: False builds no text side in the last layer beyond keys and values, for a model that never reads the tokens.
        gradient_checkpointing: Recompute the layers in the backward pass instead of storing their intermediate results.
    """

    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    patch_size: int = 16
    stem: str = "patch"
    word_fusion: bool = False
    vocab_size: int = 64010
    text_positions: int = 1022
    drop_path: float = 0.1
    start_std: float | None = None
    update_scale: float = 1.0
    final_text: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "ffn_dim", "patch_size", "vocab_size", "text_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Beit3Config: `{name}` must be a whole number, got {value!r}.")
            check_range("Beit3Config", name, value, 1)
        if self.dim % self.num_heads:
            raise ValueError(f"Beit3Config: `dim` must be a multiple of num_heads={self.num_heads}, got {self.dim}.")
        check_choice("Beit3Config", "stem", self.stem, ("patch", "conv"))
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"Beit3Config: `patch_size` must be a power of two with stem='conv', got {self.patch_size}.")
        if self.stem == "conv" and self.dim % (4 * self.patch_size):
            raise ValueError(f"Beit3Config: `dim` must be a multiple of {4 * self.patch_size} with stem='conv', got {self.dim}.")
        if self.start_std is not None:
            check_range("Beit3Config", "start_std", self.start_std, 0)
        check_range("Beit3Config", "update_scale", self.update_scale, 0)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"Beit3Config: `drop_path` must be in [0, 1), got {self.drop_path}.")


BEIT3_BASE = Beit3Config()

BEIT3_LARGE = Beit3Config(dim=1024, num_layers=24, num_heads=16, ffn_dim=4096, drop_path=0.0)
"""Without drop path: the option is misspelt in the official configuration of the large model, which therefore trains without."""

BEIT3_TINY = Beit3Config(
    dim=64,
    num_layers=3,
    num_heads=2,
    ffn_dim=128,
    patch_size=4,
    stem="conv",
    word_fusion=True,
    vocab_size=512,
    text_positions=64,
    drop_path=0.0,
    start_std=0.5,
    update_scale=0.2,
)
"""For pictures of about 64 pixels, two CPU cores, minutes, and random weights at the start, from which a linear map of patches
learns shapes ten times slower than convolutions do; joint attention alone marks everything for hundreds of steps before it tells
words apart."""


class Beit3Encoder(nn.Module):
    r"""Encode a picture and an expression together: one attention over both, all other weights separate for each modality.

    .. math:: x_m \leftarrow x_m + W^o_m\,\mathrm{LN}\big(\mathrm{softmax}(Q K^T / \sqrt{D})\,V\big)_m,\qquad
              x_m \leftarrow x_m + W^2_m\,\mathrm{LN}\big(\mathrm{GELU}(W^1_m\,\mathrm{LN}(x_m))\big)

    for both modalities :math:`m`; queries, keys and values are :math:`W^{q,k,v}_m\,\mathrm{LN}(x_m)`, joined over patches and
    tokens, so that every patch reads every real token and the other way round in every layer.

    Paper: Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks",
    arXiv:2208.10442, Sec. 2.1 (multiway layers); Wang et al., "Foundation Transformers", arXiv:2210.06423, Sec. 2 (the norms
    inside the sub-layers, Sub-LN).
    Differs from the paper: the expert for pairs in the top layers is left out, as in the public models; the unused mask token and
    the two unused first rows of each position table are not built; ``stem="conv"`` and ``start_std`` are additions. The model that
    reads it for referring segmentation (IGVG) uses the last layer's normed output alone, so nothing else is returned.

    Args:
        config: The numbers.
        image_size: Side of the square pictures that the position table is made for, in pixels.
        vocab_size: Overrides the configuration's vocabulary size.

    Shape:
        - ``images``: ``(B, 3, H, W)`` normalised, H and W multiples of the patch size; sizes other than ``image_size`` resize the
          position table. ``input_ids``: ``(B, L)``; ``valid``: ``(B, L)`` True on real tokens, None: all are.
        - returns ``visual`` ``(B, C, H / p, W / p)`` and ``tokens`` ``(B, L, C)``. Padding changes neither ``visual`` nor the real
          tokens; what stands at padded tokens is finite and means nothing.

    Raises:
        ValueError: If ``image_size``, H or W is no multiple of the patch size, the text is longer than ``text_positions``, or a
            shape does not fit.
        TypeError: If ``images`` are not floating-point or ``input_ids`` not whole numbers.

    Example:
        >>> import torch
        >>> encoder = Beit3Encoder(BEIT3_TINY, image_size=64)
        >>> visual, tokens = encoder(torch.zeros(2, 3, 64, 64), torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7))
        >>> tuple(visual.shape), tuple(tokens.shape)
        ((2, 64, 16, 16), (2, 7, 64))
    """

    def __init__(self, config: Beit3Config, *, image_size: int, vocab_size: int | None = None) -> None:
        super().__init__()
        patch, dim = config.patch_size, config.dim
        if image_size < patch or image_size % patch:
            raise ValueError(f"Beit3Encoder: `image_size` must be a multiple of patch_size={patch}, got {image_size}.")
        self.config = config
        self.grid = (image_size // patch, image_size // patch)
        self.width, self.stride = dim, patch
        self.patch_embedding = ConvStem(dim, patch) if config.stem == "conv" else nn.Conv2d(3, dim, patch, stride=patch)
        self.word_fusion = PixelWordFusion(dim, dim, position=True) if config.word_fusion else None
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.visual_position = nn.Parameter(torch.empty(1 + self.grid[0] * self.grid[1], dim))
        self.text_embedding = nn.Embedding(vocab_size or config.vocab_size, dim)
        self.text_position = nn.Parameter(torch.empty(config.text_positions, dim))
        last = config.num_layers - 1
        rates = [config.drop_path * index / max(last, 1) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(
            _Layer(config, rate, read_text=config.final_text or index < last) for index, rate in enumerate(rates)
        )
        self.visual_norm = nn.LayerNorm(dim)
        self.text_norm = nn.LayerNorm(dim) if config.final_text else None
        self.reset_parameters()

    @property
    def body(self) -> nn.Module:
        """What starts from pretrained weights and trains with the smaller rate: all of it."""
        return self

    def reset_parameters(self) -> None:
        """Xavier weights, with Sub-LN's gain ``sqrt(log(2 * layers))`` on values, outputs and feed-forward; zero biases."""
        gain = math.sqrt(math.log(2 * len(self.layers)))
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter, gain=1.0 if "q_proj" in name or "k_proj" in name else gain)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.data.mul_(self.config.update_scale)
        std = self.config.start_std
        nn.init.normal_(self.text_embedding.weight, std=self.width**-0.5 if std is None else std)
        for table in (self.cls_token, self.visual_position, self.text_position):
            nn.init.trunc_normal_(table, std=0.02 if std is None else std)

    def forward(self, images: Tensor, input_ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states, tokens = self.encode(images, input_ids, valid)
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        return states[:, 1:].transpose(1, 2).unflatten(-1, size), tokens

    def encode(self, images: Tensor, input_ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both modalities as sequences: the CLS token and the patches row by row, ``(B, 1 + P, C)``, and the tokens ``(B, L, C)``.

        With ``final_text=False`` the tokens are those that the last layer read, without a norm.
        """
        self._check(images, input_ids, valid)
        text = self.text_embedding(input_ids) + self.text_position[: input_ids.shape[1]]
        real = None if valid is None else valid.bool()
        if real is not None:
            text = text.masked_fill(~real[..., None], 0.0)
        visual = self._embed_images(images, text, real)
        attends = None if real is None else F.pad(real, (visual.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, 1 + P + L)
        for layer in self.layers:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                visual, text = run_checkpointed(layer, visual, text, attends, use_reentrant=False)
            else:
                visual, text = layer(visual, text, attends)
        return self.visual_norm(visual), text if self.text_norm is None else self.text_norm(text)

    def load_beit3(self, state_dict: Mapping[str, Any]) -> None:
        """Load the weights of a public BEiT-3 model.

        The position table of the patches is resized to this encoder's; of the text's, the first ``text_positions`` rows are taken.

        Args:
            state_dict: What the file holds, or the parameters under its key ``"model"``; heads beside the encoder are left alone.

        Raises:
            ValueError: If a parameter is missing, unknown or of another shape; nothing is loaded then.
        """
        weights: dict[str, Tensor] = convert.beit3(state_dict)
        table = weights["visual_position"]
        side = math.isqrt(table.shape[0] - 1)
        if 1 + side**2 == table.shape[0]:
            weights["visual_position"] = resize_position(table, (side, side), self.grid)
        weights["text_position"] = weights["text_position"][: self.config.text_positions]
        own = self.state_dict()
        if not self.config.final_text:
            last = f"layers.{len(self.layers) - 1}.text."
            weights = {key: value for key, value in weights.items() if key in own or not key.startswith((last, "text_norm."))}
        convert.check_fits("Beit3Encoder.load_beit3", weights, own)
        self.load_state_dict(weights)

    def _embed_images(self, images: Tensor, text: Tensor, real: Tensor | None) -> Tensor:
        patches = self.patch_embedding(images)
        if self.word_fusion is not None:
            patches = self.word_fusion(patches, text, real)
        size = (patches.shape[-2], patches.shape[-1])
        position = resize_position(self.visual_position, self.grid, size)
        rows = patches.flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(rows), -1, -1), rows], dim=1) + position

    def _check(self, images: Tensor, input_ids: Tensor, valid: Tensor | None) -> None:
        who = "Beit3Encoder"
        named = {"images": (images, "B 3 H W"), "input_ids": (input_ids, "B L")}
        check_shape(who, **named, **({} if valid is None else {"valid": (valid, "B L")}))
        check_float(who, images=images)
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise TypeError(f"{who}: `input_ids` must be whole numbers, got {input_ids.dtype}.")
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride or 0 in (height, width):
            multiples = f"(B, 3, H, W) with H and W multiples of {self.stride}"
            raise ValueError(f"{who}: `images` must be {multiples}, got {tuple(images.shape)}.")
        if input_ids.shape[1] > self.config.text_positions:
            limit = self.config.text_positions
            raise ValueError(f"{who}: `input_ids` must be at most {limit} tokens long, got {input_ids.shape[1]}.")


class _Branch(nn.Module):
    """One modality's own weights in one layer. With ``reads=False`` it is only read by the other: keys and values."""

    def __init__(self, config: Beit3Config, *, reads: bool) -> None:
        super().__init__()
        dim, self.num_heads, self.reads = config.dim, config.num_heads, reads
        self.attention_norm = nn.LayerNorm(dim)
        self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if reads:
            self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.heads_norm = nn.LayerNorm(dim)
            self.ffn_norm = nn.LayerNorm(dim)
            self.fc1, self.fc2 = nn.Linear(dim, config.ffn_dim), nn.Linear(config.ffn_dim, dim)
            self.hidden_norm = nn.LayerNorm(config.ffn_dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, D)

    def merge(self, heads: Tensor) -> Tensor:
        return self.out_proj(self.heads_norm(heads.transpose(1, 2).flatten(2)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden_norm(F.gelu(self.fc1(self.ffn_norm(x)))))


class _Layer(nn.Module):
    """Joint attention, then each modality's feed-forward network."""

    def __init__(self, config: Beit3Config, drop_path: float, *, read_text: bool) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.visual = _Branch(config, reads=True)
        self.text = _Branch(config, reads=read_text)

    def forward(self, visual: Tensor, text: Tensor, attends: Tensor | None) -> tuple[Tensor, Tensor]:
        normed = [(branch, branch.attention_norm(x)) for branch, x in ((self.visual, visual), (self.text, text))]
        key = torch.cat([branch.split(branch.k_proj(x)) for branch, x in normed], dim=2)
        value = torch.cat([branch.split(branch.v_proj(x)) for branch, x in normed], dim=2)
        query = torch.cat([branch.split(branch.q_proj(x)) for branch, x in normed if branch.reads], dim=2)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=attends)
        patches = visual.shape[1]
        factor = self._drop_factor(visual)
        visual = visual + _scaled(self.visual.merge(heads[:, :, :patches]), factor)
        if self.text.reads:
            text = text + _scaled(self.text.merge(heads[:, :, patches:]), factor)
        factor = self._drop_factor(visual)
        visual = visual + _scaled(self.visual.feed_forward(visual), factor)
        if self.text.reads:
            text = text + _scaled(self.text.feed_forward(text), factor)
        return visual, text

    def _drop_factor(self, like: Tensor) -> Tensor | None:
        """What each sample's update is multiplied with in training, in both modalities: 0 for some, the others scaled up."""
        if not (self.training and self.drop_path):
            return None
        keep = 1 - self.drop_path
        return like.new_empty(len(like), 1, 1).bernoulli_(keep) / keep


def _scaled(update: Tensor, factor: Tensor | None) -> Tensor:
    return update if factor is None else update * factor


def resize_position(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A position table of another resolution, bicubic; the first row, that of the CLS token, is kept.

    Follows microsoft/unilm, beit3/utils.py: ``align_corners=False``, in float32.

    Args:
        table: Positions of the CLS token and of the patches, row by row.
        grid: Rows and columns of patches that ``table`` is made for.
        size: Rows and columns wanted.

    Shape:
        - ``table``: ``(1 + h * w, C)``; returns ``(1 + size[0] * size[1], C)``.

    Example:
        >>> import torch
        >>> resize_position(torch.zeros(1 + 4, 8), (2, 2), (3, 5)).shape
        torch.Size([16, 8])
    """
    if grid == size:
        return table
    check_shape("resize_position", table=(table, f"{1 + grid[0] * grid[1]} C"))
    dtype = torch.promote_types(table.dtype, torch.float32)
    patches = table[1:].T.unflatten(-1, grid)[None].to(dtype)
    resized = F.interpolate(patches, size=size, mode="bicubic", align_corners=False)[0].flatten(1).T
    return torch.cat([table[:1], resized.to(table.dtype)])


def fetch_file(place: str) -> Path:
    """A file, fetched once into PyTorch's cache where ``place`` is a URL.

    Args:
        place: A path, which is returned as it is, or a URL.

    Example:
        >>> fetch_file("weights/beit3.spm").name
        'beit3.spm'
    """
    if "://" not in place:
        return Path(place)
    path = Path(torch.hub.get_dir()) / "checkpoints" / place.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(place, str(path))
    return path


def beit3_tokenizer(path: str | Path, *, clean: bool = True) -> Any:
    """The tokenizer of the public BEiT-3 models, XLM-RoBERTa's over their own sentencepiece model.

    Follows transformers' ``XLMRobertaTokenizer``: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, then the file's pieces from its
    fourth on, then ``<mask>``. It is built from the file's contents because transformers 5 takes only files named ``*.model`` and
    reads each as a unigram model.

    Args:
        path: ``beit3.spm``, or another sentencepiece model of kind unigram or BPE.
        clean: Prepare texts as InstanceVG does (instancevg/datasets/pipelines/loading.py): lower case, without ``.,'!?"()*#:;``,
            hyphens and slashes as spaces. A text of such characters alone is left with its two end tokens.

    Returns:
        A transformers tokenizer; it saves and loads like any other, without the sentencepiece package.

    Raises:
        ImportError: If sentencepiece or protobuf is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no sentencepiece model, or one of another kind.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    proto = _read_sentencepiece(Path(path))
    pieces = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(piece.piece, piece.score) for piece in proto.pieces[3:]] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(_piece_model(pieces, proto.trainer_spec.model_type))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap, clean)
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    begin_words = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), begin_words])
    tokenizer.decoder = decoders.Metaspace(replacement=space, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _read_sentencepiece(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"beit3_tokenizer: `path` must be a sentencepiece model, got {path}, which does not exist.")
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(
            "beit3_tokenizer: reading a sentencepiece model needs sentencepiece and protobuf: pip install 'gresbox[spm]'."
        ) from error
    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"beit3_tokenizer: `path` must be a sentencepiece model, got {path.name} of another form.") from error
    if [piece.piece for piece in proto.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"beit3_tokenizer: `path` must be a model that begins with <unk>, <s>, </s>, got {path.name} without.")
    return proto


def _piece_model(pieces: list[tuple[str, float]], kind: int) -> Any:
    """The segmentation model: 1 is sentencepiece's unigram model, 2 its byte-pair encoding."""
    from tokenizers import models

    if kind == 1:
        return models.Unigram(pieces, unk_id=3, byte_fallback=False)
    if kind != 2:
        raise ValueError(f"beit3_tokenizer: `path` must be a unigram or a BPE model, got kind {kind}.")
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for piece, _ in pieces[4:-1]:  # the pieces stand in the order in which their merges were learned
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= ids.keys()]
        merges += sorted(halves, key=lambda half: (ids[half[0]], ids[half[1]]))
    return models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True)


def _normalizer(charsmap: bytes, clean: bool) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if clean:
        steps += [normalizers.Lowercase(), normalizers.Replace(Regex(r"""[.,'!?"()*#:;]"""), "")]
        steps += [normalizers.Replace(Regex(r"[-/]"), " ")]
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    return normalizers.Sequence(steps)
