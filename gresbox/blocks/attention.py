"""Multi-head attention with separate projections, plain or restricted to predicted masks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops import masked_attention

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention; given mask logits, each query reads only the positions inside its own mask.

    .. math:: \mathrm{out} = W_o\,[\mathrm{softmax}(W_q q_h (W_k k_h)^T / \sqrt{D} + \mathcal M)\, W_v v_h]_h,\quad
              \mathcal M = 0 \text{ where the mask logit} \ge 0,\; -\infty \text{ elsewhere}

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.2.1,
    Eq. (2)-(3).
    Differs from the paper: nothing; a query whose mask is empty reads everything, as in its code.

    Args:
        dim: Channels ``C``.
        num_heads: Heads; ``C`` must be a multiple.

    Shape:
        - ``query``: ``(B, N, C)``; ``key``, ``value``: ``(B, P, C)``; ``mask_logits``: ``(B, N, P)``; returns ``(B, N, C)``.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads``.

    Example:
        >>> import torch
        >>> attention = MultiHeadAttention(16, 4)
        >>> attention(torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"MultiHeadAttention: `dim` must be a multiple of num_heads={num_heads}, got {dim}.")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases; with Mask2Former's gain, which packs the input projections into one (3C, C) matrix."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projected query, key and value with heads apart, ``(B, heads, ., D)``."""
        return self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))

    def merge(self, heads: Tensor) -> Tensor:
        """Join the heads ``(B, heads, N, D)`` and project to ``(B, N, C)``."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor | None = None) -> Tensor:
        check_shape("MultiHeadAttention", query=(query, "B N C"), key=(key, "B P C"), value=(value, "B P C"))
        q, k, v = self.project(query, key, value)
        if mask_logits is None:
            return self.merge(F.scaled_dot_product_attention(q, k, v))
        return self.merge(masked_attention(q, k, v, mask_logits))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
