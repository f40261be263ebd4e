"""Multi-scale deformable attention as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops import deformable_attention

__all__ = ["DeformableAttention"]


class DeformableAttention(nn.Module):
    r"""Each query reads a few learned points around its reference point in every level of a feature pyramid.

    .. math:: \mathrm{out}(q, p) = W_o\,\Big[\sum_{l,k} A_{hlk}(q)\; W_v x_l\big(p + \Delta_{hlk}(q) / (W_l, H_l)\big)\Big]_h,\quad
              A_h = \mathrm{softmax}_{l,k}

    Paper: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv:2010.04159, Sec. 4.1,
    Eq. (3).
    Differs from the paper: nothing. Offsets and weights are computed in float32 under autocast, because a location in bfloat16 is
    wrong by more than a pixel from 256 pixels on.

    Args:
        dim: Channels ``C``.
        num_levels: Levels of the pyramid.
        num_heads: Heads; ``C`` must be a multiple.
        num_points: Points per head and level.

    Shape:
        - ``query``: ``(B, Q, C)``; ``reference``: ``(B, Q, levels, 2)`` xy in [0, 1], or ``(B, Q, levels, 4)`` boxes cxcywh:
          offsets are then relative to half the box; ``value``: ``(B, S, C)``, the levels one after another; ``spatial_shapes``:
          ``[(H, W), ...]``; ``valid``: ``(B, S)`` True on real pixels; returns ``(B, Q, C)``.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads``, or a shape does not fit.

    Example:
        >>> import torch
        >>> attention = DeformableAttention(16, num_levels=2, num_heads=4)
        >>> value, reference = torch.randn(1, 4 * 4 + 2 * 2, 16), torch.rand(1, 3, 2, 2)
        >>> attention(torch.randn(1, 3, 16), reference, value, [(4, 4), (2, 2)]).shape
        torch.Size([1, 3, 16])
    """

    def __init__(self, dim: int, *, num_levels: int = 3, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DeformableAttention: `dim` must be a multiple of num_heads={num_heads}, got {dim}.")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform attention; each head looks in its own direction, one step further with every point."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # on the unit square
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = direction[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        for constant in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(constant)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        valid: Tensor | None = None,
    ) -> Tensor:
        check_shape(
            "DeformableAttention",
            query=(query, "B Q C"),
            reference=(reference, f"B Q {self.num_levels} *"),
            value=(value, "B S C"),
        )
        projected = self.value_proj(value)
        if valid is not None:
            check_shape("DeformableAttention", value=(value, "B S C"), valid=(valid, "B S"))
            projected = projected.masked_fill(~valid.bool()[..., None], 0.0)
        with torch.autocast(query.device.type, enabled=False):
            locations, logits = self._locations(query, reference, spatial_shapes)
        value = projected.unflatten(-1, (self.num_heads, -1))
        return self.output_proj(deformable_attention(value, spatial_shapes, locations, logits, softmax=True))

    def _locations(self, query: Tensor, reference: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Where each head looks, ``(B, Q, heads, levels, points, 2)``, and the logits of its weights, the same without xy."""
        heads = (self.num_heads, self.num_levels, self.num_points)
        offsets = _linear32(self.sampling_offsets, query).unflatten(-1, (*heads, 2))
        logits = _linear32(self.attention_weights, query).unflatten(-1, heads)
        reference = reference.to(offsets.dtype)[:, :, None, :, None]  # (B, Q, 1, levels, 1, 2 or 4)
        if reference.shape[-1] == 2:
            # filled on the device: a tensor made from a list would be copied there and stall it
            size = torch.stack([offsets.new_full((), float(side)) for h, w in spatial_shapes for side in (w, h)])
            locations = reference + offsets / size.view(-1, 1, 2)
        elif reference.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        else:
            raise ValueError(
                f"DeformableAttention: `reference` must end in 2 (points) or 4 (boxes) coordinates, got {reference.shape[-1]}."
            )
        return locations, logits


def _linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, or float64 where the input has it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
