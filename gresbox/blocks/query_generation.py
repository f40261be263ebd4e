"""Attention-guided query generation: the words look at the picture, and where they look queries begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape
from gresbox.blocks.heads import MLP, FeedForward
from gresbox.blocks.point_selection import DistScorePointSelector
from gresbox.blocks.position import sine_position
from gresbox.blocks.text_selection import ScoreTextSelector

__all__ = ["AttentionGuidedQueryGeneration", "GeneratedQueries", "InjectTextQuery"]


class GeneratedQueries(NamedTuple):
    """What :class:`AttentionGuidedQueryGeneration` returns.

    Args:
        queries: Initial queries, ``(B, N, C)``.
        points: Prior points, ``(B, N, 2)`` xy in (0, 1), in order of selection; no gradient.
        indices: Their cells, ``(B, N)`` int64, ``row * w + column``.
        minimap: Score map that the points were chosen on, ``(B, h, w)`` float32; its supervision is
            ``GresOutput.extras["minimap"]``.
        attention: Map of each selected token, ``(B, K, h, w)`` float32, sums to 1 over the picture.
        words: The selected tokens' positions in the text, ``(B, K)`` int64, -1 where there is no token.
    """

    queries: Tensor
    points: Tensor
    indices: Tensor
    minimap: Tensor
    attention: Tensor
    words: Tensor


class AttentionGuidedQueryGeneration(nn.Module):
    r"""Selected words attend to the picture; points with much attention, far apart, give the queries their place and content.

    .. math:: A = \mathrm{softmax}\Big(\tfrac{(T + c) W_q\, ((F_i + e) W_k)^\top}{\sqrt D}\Big),\quad
              M_s = \mathrm{pool}_t\,\mathrm{mean}_h\, A,\quad P_r = \mathrm{DSPS}(M_s),\\
              Q_{init} = \mathrm{MLP}([F_q;\; F_i(P_r)]),\quad F_q = \mathrm{LN}(\mathrm{FFN}(\mathrm{LN}(c + A F_i W_v W_o)))

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.1, Eq. (1)-(2), Table 6.
    Differs from the paper: Eq. (1) prints a product with :math:`F_i`, which would have no places left; as in the authors' code the
    map is the attention itself, and the attention is that of a post-norm DETR decoder layer whose self-attention reads zero
    values, so that all it adds, norm included, is one vector :math:`c`: here that vector is learned itself. The i-th word goes with
    the i-th point, which is the order of their selection and nothing else. In training the code's map holds the dropout's noise;
    here dropout acts on what the queries read, not on the map.

    Args:
        dim: Channels ``C``, a multiple of 4 and of ``num_heads``.
        num_queries: Queries ``N``.
        text_selector: Called with ``num_queries``; ``functools.partial`` sets its options. None: all words take part (Table 6
            without STS), which needs ``inject_text=False``.
        point_selector: Called with ``num_queries``; ``partial(DistScorePointSelector, distance_weight=0.0)`` is Table 6 without
            DSPS.
        inject_text: False: queries are the picture's features at the points alone (Table 6 without ITQ). Attention then only
            learns from the minimap's supervision.
        pooling: ``"mean"`` over the selected words, as in the paper, or ``"max"``, as in its code.
        minimap: ``"probs"``: the attention, as in paper and code; ``"logits"`` (ours): the same before the softmax, which is a
            logit as its loss takes it to be.
        num_heads: Attention heads.
        ffn_dim: Width of the feed-forward layer.
        dropout: Share of attention weights and feed-forward values that training drops.

    Shape:
        - ``tokens``: ``(B, L, C)``; ``features``: ``(B, C, h, w)``; ``valid``: ``(B, L)`` True on real tokens, None: all are.
        - returns :class:`GeneratedQueries`. Padding takes no part. A text of padding only has a minimap of zeros; its points are
          then spread over the picture.

    Raises:
        ValueError: If an option is unknown, text is to be injected without a text selector, there are more queries than cells, or
            a shape does not fit.

    Example:
        >>> import torch
        >>> generation = AttentionGuidedQueryGeneration(16, 5, num_heads=4, ffn_dim=32)
        >>> generated = generation(torch.randn(2, 7, 16), torch.randn(2, 16, 4, 4))
        >>> generated.queries.shape, generated.points.shape, generated.minimap.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 2]), torch.Size([2, 4, 4]))
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 10,
        *,
        text_selector: Callable[[int], nn.Module] | None = ScoreTextSelector,
        point_selector: Callable[[int], nn.Module] = DistScorePointSelector,
        inject_text: bool = True,
        pooling: str = "mean",
        minimap: str = "probs",
        num_heads: int = 8,
        ffn_dim: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        who = "AttentionGuidedQueryGeneration"
        check_range(who, "num_queries", num_queries, 1)
        check_choice(who, "pooling", pooling, ("mean", "max"))
        check_choice(who, "minimap", minimap, ("probs", "logits"))
        if dim % 4 or dim % num_heads:
            raise ValueError(f"{who}: `dim` must be a multiple of 4 and of num_heads={num_heads}, got {dim}.")
        if text_selector is None and inject_text:
            raise ValueError(f"{who}: `inject_text` must be False without a text selector, which pairs words and points, got True.")
        self.num_queries, self.num_heads, self.pooling, self.minimap = num_queries, num_heads, pooling, minimap
        self.text_selector = None if text_selector is None else text_selector(num_queries)
        self.point_selector = point_selector(num_queries)
        self.content = nn.Parameter(torch.zeros(dim))
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.q_proj, self.k_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)  # as a part of one (3C, C) matrix
            nn.init.zeros_(layer.bias)
        self.inject = InjectTextQuery(dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout) if inject_text else None

    def forward(self, tokens: Tensor, features: Tensor, valid: Tensor | None = None) -> GeneratedQueries:
        valid = self._check(tokens, features, valid)
        height, width = features.shape[-2:]
        words, real, positions = self._select(tokens, valid)
        memory = features.flatten(2).transpose(1, 2)  # (B, P, C)
        affinity = self._affinity(words, memory, (height, width))  # (B, heads, K, P)
        shares = affinity.softmax(-1)
        minimap = self._pool((shares if self.minimap == "probs" else affinity).mean(1), real).unflatten(-1, (height, width))
        indices, points = self.point_selector(minimap)
        queries = memory.gather(1, indices[..., None].expand(-1, -1, memory.shape[2]))
        if self.inject is not None:
            queries = self.inject(queries, shares, memory, self.content)
        return GeneratedQueries(queries, points, indices, minimap, shares.mean(1).unflatten(-1, (height, width)), positions)

    def _check(self, tokens: Tensor, features: Tensor, valid: Tensor | None) -> Tensor:
        """Check the shapes; ``valid`` as bool."""
        who, dim = "AttentionGuidedQueryGeneration", self.content.shape[0]
        named = {"tokens": (tokens, f"B L {dim}"), "features": (features, f"B {dim} h w")}
        if valid is not None:
            named["valid"] = (valid, "B L")
        sizes = check_shape(who, **named)
        check_range(who, "num_queries", self.num_queries, 1, sizes["h"] * sizes["w"])
        return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid.bool()

    def _select(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The words that attend, which of them are real, and where they stand."""
        if self.text_selector is not None:
            return self.text_selector(tokens, valid)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        return tokens.masked_fill(~valid[..., None], 0.0), valid, positions.masked_fill(~valid, -1)

    def _affinity(self, words: Tensor, memory: Tensor, size: tuple[int, int]) -> Tensor:
        """Scaled products of words and cells per head, ``(B, heads, K, P)``, float32 (float64 for float64)."""
        table = sine_position(*size, memory.shape[2], device=memory.device, dtype=memory.dtype).flatten(1).T
        query = self.q_proj(words + self.content.to(words.dtype)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = self.k_proj(memory + table).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            return query.to(wide) * query.shape[-1] ** -0.5 @ key.to(wide).mT

    def _pool(self, maps: Tensor, real: Tensor) -> Tensor:
        """One map of all real words, ``(B, K, P) -> (B, P)``; zeros where there is no word."""
        real = real[..., None]
        if self.pooling == "mean":
            return maps.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
        return maps.masked_fill(~real, float("-inf")).amax(1).masked_fill(~real.any(1), 0.0)


class InjectTextQuery(nn.Module):
    r"""Join what the words read in the picture with the picture's features at the points.

    .. math:: Q_{init} = \mathrm{MLP}([F_q;\; Q_{filter}]),\quad F_q = \mathrm{LN}(\mathrm{FFN}(\mathrm{LN}(c + A F_i W_v W_o)))

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.1, Eq. (2), and the ablation "ITQ" of Table 6.
    Differs from the paper: the text comes first in the concatenation, as in the authors' code; the perceptron has three layers.

    Args:
        dim: Channels ``C``.
        num_heads: Attention heads.
        ffn_dim: Width of the feed-forward layer.
        dropout: Share of attention weights and feed-forward values that training drops.

    Shape:
        - ``queries``: ``(B, N, C)``, features at the points; ``shares``: ``(B, heads, N, P)``, attention of the words, rows sum to
          1; ``memory``: ``(B, P, C)``; ``content``: ``(C,)``; returns ``(B, N, C)``.

    Example:
        >>> import torch
        >>> inject = InjectTextQuery(8, num_heads=2, ffn_dim=16)
        >>> shares = torch.rand(1, 2, 3, 6).softmax(-1)
        >>> inject(torch.randn(1, 3, 8), shares, torch.randn(1, 6, 8), torch.zeros(8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, *, num_heads: int = 8, ffn_dim: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.v_proj.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        for layer in (self.v_proj, self.out_proj):
            nn.init.zeros_(layer.bias)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout=dropout)
        self.output_norm = nn.LayerNorm(dim)
        self.mlp = MLP(2 * dim, dim, dim)

    def forward(self, queries: Tensor, shares: Tensor, memory: Tensor, content: Tensor) -> Tensor:
        value = self.v_proj(memory).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, P, D)
        read = F.dropout(shares, self.dropout, self.training).to(value.dtype) @ value
        text = self.attention_norm(content + self.out_proj(read.transpose(1, 2).flatten(2)))
        return self.mlp(torch.cat([self.output_norm(self.ffn(text)), queries.to(text.dtype)], dim=-1))
