"""Decoders that turn initial queries into instances: deformable around prior points, and DETR's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape
from gresbox.blocks.attention import MultiHeadAttention
from gresbox.blocks.deformable_attention import DeformableAttention
from gresbox.blocks.heads import FeedForward
from gresbox.blocks.position import sine_position

__all__ = ["DETRDecoder", "DecodedQueries", "DeformableDecoder", "LearnedPrior", "PointPrior"]


class DecodedQueries(NamedTuple):
    """What the decoders return; :class:`gresbox.blocks.InstanceHead` reads both.

    Args:
        steps: The queries after each layer, ``(B, N, C)`` each.
        reference: The points that boxes are relative to, ``(B, N, 2)`` xy, or None for a prior without them.
    """

    steps: tuple[Tensor, ...]
    reference: Tensor | None


class PointPrior(nn.Module):
    r"""Place each query at its prior point.

    .. math:: e = W_e P_r + b_e,\qquad r = P_r \quad\text{or}\quad r = P_r + \sigma(W_r e + b_r)

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.1 and Table 7, "point-prior".
    Differs from the paper: nothing with ``reference="points"``, where the prior points are the reference points, as it says. In the
    authors' code (``"shifted"``) they start half a picture away to the lower right and may lie outside of it.

    Args:
        dim: Channels ``C``.
        reference: ``"points"`` or ``"shifted"``.

    Shape:
        - ``points``: ``(B, N, 2)`` xy in [0, 1].
        - returns the queries' position ``(B, N, C)`` and the reference points ``(B, N, 2)``.

    Raises:
        ValueError: If ``reference`` is unknown, or a shape does not fit.

    Example:
        >>> import torch
        >>> position, reference = PointPrior(8)(torch.rand(2, 5, 2))
        >>> position.shape, reference.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 2]))
    """

    def __init__(self, dim: int, *, reference: str = "points") -> None:
        super().__init__()
        check_choice("PointPrior", "reference", reference, ("points", "shifted"))
        self.position = nn.Linear(2, dim)
        self.shift = nn.Linear(dim, 2) if reference == "shifted" else None
        if self.shift is not None:
            nn.init.xavier_normal_(self.shift.weight)
            nn.init.zeros_(self.shift.bias)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("PointPrior", points=(points, "B N 2"))
        position = self.position(points.to(self.position.weight.dtype))
        return position, points if self.shift is None else points + self.shift(position).sigmoid()


class LearnedPrior(nn.Module):
    r"""Place each query at a learned position, whatever the prior points are.

    .. math:: e \text{ a table},\qquad r = \sigma(W_r e + b_r)

    Paper: Zhu et al., "Deformable DETR", arXiv:2010.04159, Sec. 4.1; "no prior" of IGVG's Table 7.
    Differs from the paper: nothing.

    Args:
        dim: Channels ``C``.
        num_queries: Queries ``N``.
        reference: False: no reference points, for DETR's decoder, whose boxes are not relative to any.

    Shape:
        - ``points``: ``(B, N, 2)``, of which only the shape is read.
        - returns the queries' position ``(B, N, C)`` and the reference points ``(B, N, 2)`` in (0, 1), or None.

    Raises:
        ValueError: If ``points`` are not as many as the table has rows.

    Example:
        >>> import torch
        >>> position, reference = LearnedPrior(8, 5)(torch.rand(2, 5, 2))
        >>> position.shape, reference.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 2]))
    """

    def __init__(self, dim: int, num_queries: int, *, reference: bool = True) -> None:
        super().__init__()
        check_range("LearnedPrior", "num_queries", num_queries, 1)
        self.position = nn.Parameter(torch.randn(num_queries, dim))
        self.point = nn.Linear(dim, 2) if reference else None
        if self.point is not None:
            nn.init.xavier_uniform_(self.point.weight)
            nn.init.zeros_(self.point.bias)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        check_shape("LearnedPrior", points=(points, f"B {self.position.shape[0]} 2"))
        position = self.position.expand(points.shape[0], -1, -1)
        return position, None if self.point is None else self.point(position).sigmoid()


class _DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, all post-norm. A subclass says what the cross-attention reads."""

    def __init__(self, dim: int, cross_attention: nn.Module, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attention = MultiHeadAttention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout=dropout)

    def _attend(self, attention: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention that drops some of its weights in training."""
        q, k, v = attention.project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        return attention.merge(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))

    def _self_attend(self, queries: Tensor, position: Tensor) -> Tensor:
        placed = queries + position
        return self.self_norm(queries + self._attend(self.self_attention, placed, placed, queries))


class _DeformableLayer(_DecoderLayer):
    def forward(
        self, queries: Tensor, position: Tensor, reference: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        queries = self._self_attend(queries, position)
        read = self.cross_attention(queries + position, reference, value, shapes)
        return self.ffn(self.cross_norm(queries + F.dropout(read, self.dropout, self.training)))


class _DETRLayer(_DecoderLayer):
    def forward(self, queries: Tensor, position: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = self._self_attend(queries, position)
        read = self._attend(self.cross_attention, queries + position, key, value)  # type: ignore[arg-type]
        return self.ffn(self.cross_norm(queries + read))


class DeformableDecoder(nn.Module):
    r"""Queries look at a few places around their reference points in every level of a pyramid, layer by layer.

    .. math:: Q \leftarrow \mathrm{LN}(Q + \mathrm{MHA}(Q + e, Q + e, Q)),\quad
              Q \leftarrow \mathrm{LN}(Q + \mathrm{MSDA}(Q + e, r, c)),\quad Q \leftarrow \mathrm{FFN}(Q)

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1, Table 7; Zhu et al., "Deformable DETR",
    arXiv:2010.04159.
    Differs from the paper: nothing that it states. As in the authors' code there is no encoder, the levels have no position or
    level embedding, and all layers look around the same reference points, without refinement.

    Table 7: point-prior multi-scale is the default; ``prior=LearnedPrior(dim, N)`` is multi-scale without points;
    ``num_levels=1`` with one map is single scale; :class:`DETRDecoder` is the plain one.

    Args:
        dim: Channels ``C``.
        prior: ``points -> (position, reference)``; None: :class:`PointPrior`.
        num_layers: Layers.
        num_heads: Heads of both attentions.
        num_levels: Levels of the pyramid.
        num_points: Points per head and level.
        ffn_dim: Width of the feed-forward layers.
        dropout: Share of attention weights and sub-layer values that training drops.

    Shape:
        - ``queries``: ``(B, N, C)``; ``points``: ``(B, N, 2)`` xy in [0, 1]; ``levels``: ``num_levels`` maps ``(B, C, h, w)``,
          always in the same order.
        - returns :class:`DecodedQueries`.

    Raises:
        ValueError: If ``num_layers`` or ``num_levels`` is below 1, the number of levels differs, the prior gives no reference
            points, or a shape does not fit.

    Example:
        >>> import torch
        >>> decoder = DeformableDecoder(16, num_layers=2, num_heads=4, num_levels=2, ffn_dim=32)
        >>> levels = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
        >>> steps, reference = decoder(torch.randn(1, 5, 16), torch.rand(1, 5, 2), levels)
        >>> len(steps), steps[-1].shape, reference.shape
        (2, torch.Size([1, 5, 16]), torch.Size([1, 5, 2]))
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        prior: nn.Module | None = None,
        num_layers: int = 3,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_range("DeformableDecoder", "num_layers", num_layers, 1)
        check_range("DeformableDecoder", "num_levels", num_levels, 1)
        self.dim, self.num_levels = dim, num_levels
        self.prior = PointPrior(dim) if prior is None else prior
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            cross_attention = DeformableAttention(dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points)
            self.layers.append(_DeformableLayer(dim, cross_attention, num_heads, ffn_dim, dropout))

    def forward(self, queries: Tensor, points: Tensor, levels: Sequence[Tensor]) -> DecodedQueries:
        if len(levels) != self.num_levels:
            raise ValueError(f"DeformableDecoder: `levels` must be {self.num_levels} maps, got {len(levels)}.")
        _check_inputs("DeformableDecoder", queries, points, levels, self.dim)
        position, reference = self.prior(points)
        if reference is None:
            raise ValueError("DeformableDecoder: `prior` must give reference points to look around, got None.")
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        value = torch.cat([level.flatten(2) for level in levels], dim=-1).transpose(1, 2)  # (B, S, C)
        around = reference[:, :, None].expand(-1, -1, self.num_levels, -1)
        steps = []
        for layer in self.layers:
            queries = layer(queries, position, around, value, shapes)
            steps.append(queries)
        return DecodedQueries(tuple(steps), reference)


class DETRDecoder(nn.Module):
    r"""Queries attend to all cells, layer by layer.

    .. math:: Q \leftarrow \mathrm{LN}(Q + \mathrm{MHA}(Q + e, Q + e, Q)),\quad
              Q \leftarrow \mathrm{LN}(Q + \mathrm{MHA}(Q + e, F + p, F)),\quad Q \leftarrow \mathrm{FFN}(Q)

    Paper: Carion et al., "End-to-End Object Detection with Transformers" (DETR), arXiv:2005.12872, App. A.3; the baseline of IGVG's
    Table 7.
    Differs from the paper: it starts from given queries, not from zeros; no norm follows the last layer, which ends in one.

    Args:
        dim: Channels ``C``, a multiple of 4.
        num_queries: Queries ``N`` of the learned positions; not read with a ``prior``.
        prior: ``points -> (position, reference)``; None: learned positions without reference points.
        num_layers: Layers.
        num_heads: Heads of both attentions.
        ffn_dim: Width of the feed-forward layers.
        dropout: Share of attention weights and feed-forward values that training drops.

    Shape:
        - ``queries``: ``(B, N, C)``; ``points``: ``(B, N, 2)`` xy in [0, 1]; ``levels``: maps ``(B, C, h, w)``, usually one.
        - returns :class:`DecodedQueries`.

    Raises:
        ValueError: If ``num_layers`` is below 1, there is no map, or a shape does not fit.

    Example:
        >>> import torch
        >>> decoder = DETRDecoder(16, 5, num_layers=2, num_heads=4, ffn_dim=32)
        >>> steps, reference = decoder(torch.randn(1, 5, 16), torch.rand(1, 5, 2), [torch.randn(1, 16, 4, 4)])
        >>> len(steps), steps[-1].shape, reference
        (2, torch.Size([1, 5, 16]), None)
    """

    def __init__(
        self,
        dim: int = 256,
        num_queries: int = 10,
        *,
        prior: nn.Module | None = None,
        num_layers: int = 3,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_range("DETRDecoder", "num_layers", num_layers, 1)
        self.dim = dim
        self.prior = LearnedPrior(dim, num_queries, reference=False) if prior is None else prior
        self.layers = nn.ModuleList(
            _DETRLayer(dim, MultiHeadAttention(dim, num_heads), num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )

    def forward(self, queries: Tensor, points: Tensor, levels: Sequence[Tensor]) -> DecodedQueries:
        if not len(levels):
            raise ValueError("DETRDecoder: `levels` must hold at least one map, got none.")
        _check_inputs("DETRDecoder", queries, points, levels, self.dim)
        position, reference = self.prior(points)
        value = torch.cat([level.flatten(2) for level in levels], dim=-1).transpose(1, 2)  # (B, S, C)
        tables = [
            sine_position(level.shape[-2], level.shape[-1], self.dim, device=value.device, dtype=value.dtype) for level in levels
        ]
        key = value + torch.cat([table.flatten(1) for table in tables], dim=-1).T
        steps = []
        for layer in self.layers:
            queries = layer(queries, position, key, value)
            steps.append(queries)
        return DecodedQueries(tuple(steps), reference)


def _check_inputs(who: str, queries: Tensor, points: Tensor, levels: Sequence[Tensor], dim: int) -> None:
    named = {f"levels[{i}]": (level, f"B {dim} * *") for i, level in enumerate(levels)}
    check_shape(who, queries=(queries, f"B N {dim}"), points=(points, "B N 2"), **named)
