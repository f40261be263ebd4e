"""The phrase-object transformer: queries that find instances and learn which phrases they answer to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as run_checkpointed

from gresbox._checks import check_range, check_shape
from gresbox.blocks.attention import MultiHeadAttention
from gresbox.blocks.heads import MLP, FeedForward, mean_token
from gresbox.blocks.object_text import ParallelObjectText
from gresbox.blocks.position import sine_position, sine_position_1d
from gresbox.structures import InstancePrediction

__all__ = ["PhraseObjectBlock", "PhraseObjectTransformer", "attention_mask_logits", "downsample_pixels"]


@torch.no_grad()
def downsample_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Per-pixel features at a memory level's size, for that level's attention masks.

    .. math:: \mathrm{resize}(V) \in \mathbb R^{C \times h \times w},\qquad Q\,\mathrm{resize}(V) = \mathrm{resize}(Q V)

    Bilinear resizing is linear, so masks need not be built in full before they are resized.

    Paper: arXiv:2112.01527, Sec. 3.2.1 resizes the masks.
    Differs from the paper: resizes the features, once per level; the result is the same up to rounding.

    Args:
        pixels: Features of every pixel.
        size: Rows and columns of the level.

    Shape:
        - ``pixels``: ``(B, C, H, W)``; returns ``(B, C, h, w)``, float32 (float64 for float64), without a gradient.

    Example:
        >>> import torch
        >>> downsample_pixels(torch.ones(1, 3, 8, 8), (2, 4)).shape
        torch.Size([1, 3, 2, 4])
    """
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    (height, width), (rows, columns) = pixels.shape[-2:], size
    if height % (2 * rows) or width % (2 * columns):
        return F.interpolate(pixels.to(dtype), size=size, mode="bilinear", align_corners=False)
    # By an even factor each sample is the plain mean of the four pixels around it: strided reads, two to ten times faster on a CPU.
    down, across = height // rows, width // columns
    corners = [pixels[..., y::down, x::across].to(dtype) for y in _middle(down) for x in _middle(across)]
    return (corners[0] + corners[1] + corners[2] + corners[3]) / 4


def _middle(factor: int) -> tuple[int, int]:
    """The two middle positions of an even number of positions."""
    return factor // 2 - 1, factor // 2


@torch.no_grad()
def attention_mask_logits(embeddings: Tensor, level_pixels: Tensor) -> Tensor:
    """Mask logits at one memory level; a query attends where they are not negative.

    Paper: arXiv:2112.01527, Eq. (3): the resized mask of the step before, cut at probability 0.5, which is logit 0.
    Differs from the paper: the logit is compared, because a sigmoid in half precision rounds small negatives to 0.5.

    Args:
        embeddings: Mask embeddings of a prediction step.
        level_pixels: What :func:`downsample_pixels` returns.

    Shape:
        - ``embeddings``: ``(B, N, C)``; ``level_pixels``: ``(B, C, h, w)``; returns ``(B, N, h * w)``, float32 (float64 for
          float64), without a gradient.

    Example:
        >>> import torch
        >>> attention_mask_logits(torch.ones(1, 2, 3), torch.ones(1, 3, 2, 2)).shape
        torch.Size([1, 2, 4])
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return embeddings.to(level_pixels.dtype) @ level_pixels.flatten(2)


class PhraseObjectBlock(nn.Module):
    r"""One block: masked visual attention, object-text attention, self-attention, feed-forward; all post-norm.

    .. math:: Q \leftarrow \mathrm{LN}(Q + \mathrm{MHA}(Q, V_l; \mathcal M)),\quad (Q, T) \leftarrow \mathrm{ObjectText}(Q, T),\quad
              Q \leftarrow \mathrm{LN}(Q + \mathrm{MHA}(Q, Q)),\quad Q \leftarrow \mathrm{FFN}(Q)

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3, Fig. 3.
    Differs from the paper: nothing that it states; the sub-layers are Mask2Former's.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of every attention.
        ffn_dim: Width of the feed-forward layer.
        object_text: The object-text layer; None: the block of Mask2Former, and the tokens pass through.

    Shape:
        - ``queries``: ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``; ``key``, ``value``: ``(B, P, C)``, one
          memory level with and without its position table; ``mask_logits``: ``(B, N, P)``; ``query_position``: ``(N, C)``;
          ``token_position``: ``(L, C)`` or None.
        - returns the new queries and tokens.

    Example:
        >>> import torch
        >>> block = PhraseObjectBlock(16, 4, 32, ParallelObjectText(16, 4))
        >>> queries, tokens, memory = torch.randn(1, 5, 16), torch.randn(1, 3, 16), torch.randn(1, 6, 16)
        >>> queries, tokens = block(queries, tokens, None, memory, memory, torch.zeros(1, 5, 6), torch.zeros(5, 16))
        >>> queries.shape, tokens.shape
        (torch.Size([1, 5, 16]), torch.Size([1, 3, 16]))
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, object_text: nn.Module | None = None) -> None:
        super().__init__()
        self.cross_attention = MultiHeadAttention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.object_text = object_text
        self.self_attention = MultiHeadAttention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        valid: Tensor | None,
        key: Tensor,
        value: Tensor,
        mask_logits: Tensor,
        query_position: Tensor,
        token_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        queries = self.cross_norm(queries + self.cross_attention(queries + query_position, key, value, mask_logits))
        if self.object_text is not None:
            queries, tokens = self.object_text(queries, tokens, valid, query_position=query_position, token_position=token_position)
        placed = queries + query_position
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        return self.ffn(queries), tokens


class PhraseObjectTransformer(nn.Module):
    r"""Learned queries become instances while they and the words of the expression refine each other, block by block.

    .. math:: (Q_k, T_k) = \mathrm{Block}_k(Q_{k-1}, T_{k-1}, V_{(k-1) \bmod 3}; \mathcal M_{k-1}),\qquad
              \hat p_k = W\,\mathrm{LN}(Q_k),\quad \hat s_k = \mathrm{MLP}(\mathrm{LN}(Q_k))\, V_4^T

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3, Eq. (4).
    Differs from the paper: Eq. (4) prints no perceptron on the queries; ``mask_head=nn.Identity()`` is that, the default is
    Mask2Former's three layers. Heads read the queries through one shared norm. Masks stay factored: no step builds
    ``(B, N, H/4, W/4)``.

    Args:
        dim: Channels ``C``, a multiple of 4.
        num_layers: Blocks ``K``, at least 1.
        num_heads: Heads of every attention.
        ffn_dim: Width of the feed-forward layers.
        num_queries: Queries ``N``.
        num_levels: Memory levels; block ``k`` reads level ``(k - 1) mod num_levels``.
        object_text: Called as ``object_text(dim, num_heads)`` once per block; ``functools.partial`` sets its options. None: the
            decoder of Mask2Former, and the tokens pass through.
        mask_head: ``(B, N, C) -> (B, N, channels of pixels)``; None: three layers.
        score_prior: Relevance that every query starts with; a small one keeps the merged mask well-conditioned at the start.
        token_position: Add a sine table to the tokens inside object-text attention. Off: the text encoder has placed them.
        text_queries: Add a linear map of the tokens' mean to the learned queries, so that what is predicted before block 1 depends
            on the expression already, as in VATEX (arXiv:2404.08590). Off: the paper starts from learned queries alone.
        final_text: False builds no text side in the last block, for a model that reads neither the tokens of the last step (no
            phrase loss) nor their mean; otherwise these parameters would have no gradient.
        checkpoint: Recompute each block in the backward pass instead of storing its intermediate results.

    Shape:
        - ``memories``: ``num_levels`` maps ``(B, C, h, w)``, lowest resolution first; ``pixels``: ``(B, C, H/4, W/4)``;
          ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` True on real tokens.
        - returns ``K + 1`` :class:`~gresbox.structures.InstancePrediction`; the first is what the learned queries predict before
          block 1. Padded tokens are zero in all of them.

    Raises:
        ValueError: If ``num_layers`` or ``num_levels`` is below 1, ``score_prior`` is not in (0, 1), the number of memories is
            not ``num_levels``, or a shape does not fit.

    Example:
        >>> import torch
        >>> transformer = PhraseObjectTransformer(16, num_layers=2, num_heads=4, ffn_dim=32, num_queries=5, num_levels=2)
        >>> memories = [torch.randn(1, 16, 2, 2), torch.randn(1, 16, 4, 4)]
        >>> steps = transformer(memories, torch.randn(1, 16, 8, 8), torch.randn(1, 3, 16))
        >>> len(steps), steps[-1].score_logits.shape, steps[-1].masks.shape
        (3, torch.Size([1, 5]), torch.Size([1, 5, 8, 8]))
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        num_layers: int = 9,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        num_queries: int = 100,
        num_levels: int = 3,
        object_text: Callable[..., nn.Module] | None = ParallelObjectText,
        mask_head: nn.Module | None = None,
        score_prior: float = 0.01,
        token_position: bool = False,
        text_queries: bool = False,
        final_text: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_range("PhraseObjectTransformer", "num_layers", num_layers, 1)
        check_range("PhraseObjectTransformer", "num_levels", num_levels, 1)
        if not 0 < score_prior < 1:
            raise ValueError(f"PhraseObjectTransformer: `score_prior` must be in (0, 1), got {score_prior}.")
        self.num_levels, self.token_position, self.checkpoint = num_levels, token_position, checkpoint
        self.query_features = nn.Parameter(torch.randn(num_queries, dim))
        self.query_positions = nn.Parameter(torch.randn(num_queries, dim))
        self.text_start = nn.Linear(dim, dim) if text_queries else None
        # With fewer blocks than levels the last levels are never read, so they own no embedding.
        self.level_embedding = nn.Parameter(torch.randn(min(num_levels, num_layers), dim))
        layers = []
        for index in range(num_layers):
            options = {"update_text": False} if index == num_layers - 1 and not final_text else {}
            text = None if object_text is None else object_text(dim, num_heads, **options)
            layers.append(PhraseObjectBlock(dim, num_heads, ffn_dim, text))
        self.layers = nn.ModuleList(layers)
        self.decoder_norm = nn.LayerNorm(dim)
        self.score_head = nn.Linear(dim, 1)
        nn.init.constant_(self.score_head.bias, -math.log((1 - score_prior) / score_prior))
        self.mask_head = MLP(dim, dim, dim) if mask_head is None else mask_head

    def forward(
        self, memories: Sequence[Tensor], pixels: Tensor, tokens: Tensor, valid: Tensor | None = None
    ) -> tuple[InstancePrediction, ...]:
        valid = self._check(memories, pixels, tokens, valid)
        if valid is not None:  # what stands in the padding must not matter, not even if it is not finite
            tokens = tokens.masked_fill(~valid[..., None], 0.0)
        levels = [self._level(index, memory) for index, memory in enumerate(memories[: len(self.level_embedding)])]
        level_pixels = [downsample_pixels(pixels, (m.shape[-2], m.shape[-1])) for m in memories[: len(levels)]]
        token_position = None
        if self.token_position:
            token_position = sine_position_1d(tokens.shape[1], tokens.shape[2], device=tokens.device, dtype=tokens.dtype)
        queries = self.query_features.expand(pixels.shape[0], -1, -1)
        if self.text_start is not None:
            queries = queries + self.text_start(mean_token(tokens, valid).to(tokens.dtype))[:, None]
        steps = [self._predict(queries, pixels, tokens, valid)]
        for index, layer in enumerate(self.layers):
            level = index % self.num_levels
            mask_logits = attention_mask_logits(steps[-1].mask_embeddings, level_pixels[level])
            inputs = (queries, tokens, valid, *levels[level], mask_logits, self.query_positions, token_position)
            if self.checkpoint and torch.is_grad_enabled():
                queries, tokens = run_checkpointed(layer, *inputs, use_reentrant=False)
            else:
                queries, tokens = layer(*inputs)
            steps.append(self._predict(queries, pixels, tokens, valid))
        return tuple(steps)

    def _check(self, memories: Sequence[Tensor], pixels: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor | None:
        """Check the shapes; ``valid`` as bool."""
        if len(memories) != self.num_levels:
            raise ValueError(
                f"PhraseObjectTransformer: `memories` must be {self.num_levels} maps, lowest resolution first, got {len(memories)}."
            )
        dim = self.query_features.shape[1]
        named = {f"memories[{i}]": (memory, f"B {dim} * *") for i, memory in enumerate(memories)}
        named |= {"pixels": (pixels, "B * * *"), "tokens": (tokens, f"B L {dim}")}
        if valid is not None:
            named["valid"] = (valid, "B L")
        check_shape("PhraseObjectTransformer", **named)
        return None if valid is None else valid.bool()

    def _level(self, index: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (with position) and values of one memory level, ``(B, P, C)`` each."""
        value = memory.flatten(2).transpose(1, 2) + self.level_embedding[index]
        height, width = memory.shape[-2:]
        table = sine_position(height, width, memory.shape[1], device=memory.device, dtype=value.dtype)
        return value + table.flatten(1).T, value

    def _predict(self, queries: Tensor, pixels: Tensor, tokens: Tensor, valid: Tensor | None) -> InstancePrediction:
        """What the heads read off the queries, masks as embeddings."""
        normed = self.decoder_norm(queries)
        return InstancePrediction(
            score_logits=self.score_head(normed)[..., 0],
            mask_embeddings=self.mask_head(normed),
            pixels=pixels,
            queries=queries,
            tokens=tokens,
            valid=valid,
            normed=normed,
        )
