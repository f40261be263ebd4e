"""Small perceptrons that several blocks are made of."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from gresbox._checks import check_range

__all__ = ["MLP", "FeedForward", "mean_token"]


class MLP(nn.Module):
    r"""Linear layers with a ReLU between each two.

    .. math:: \mathrm{MLP}(x) = W_n\,\mathrm{ReLU}(\dots \mathrm{ReLU}(W_1 x + b_1) \dots) + b_n

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527 (the mask
    embedding head).
    Differs from the paper: nothing.

    Args:
        in_dim: Input channels.
        hidden_dim: Channels between the layers.
        out_dim: Output channels.
        num_layers: Number of linear layers.

    Shape:
        - ``(..., in_dim) -> (..., out_dim)``.

    Raises:
        ValueError: If ``num_layers`` is below 1.

    Example:
        >>> import torch
        >>> MLP(8, 16, 2)(torch.randn(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int = 3) -> None:
        super().__init__()
        check_range("MLP", "num_layers", num_layers, 1)
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    r"""The feed-forward sub-layer of a post-norm transformer.

    .. math:: \mathrm{FFN}(x) = \mathrm{LN}(x + W_2\,\mathrm{ReLU}(W_1 x + b_1) + b_2)

    Paper: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, Sec. 3.3, as Mask2Former uses it.
    Differs from the paper: no dropout, which Mask2Former switches off.

    Args:
        dim: Channels ``C``.
        hidden_dim: Channels between the two layers.

    Shape:
        - ``(..., C) -> (..., C)``.

    Example:
        >>> import torch
        >>> FeedForward(8, 32)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu()))


def mean_token(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over real tokens; 0 where there is none, whatever stands in the padding.

    Args:
        tokens: Word features.
        valid: True on real tokens; None: all are real.

    Shape:
        - ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``; returns ``(B, C)``, float32 (float64 for float64).

    Example:
        >>> import torch
        >>> mean_token(torch.tensor([[[2.0], [4.0]]]), torch.tensor([[1, 0]]))
        tensor([[2.]])
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if valid is None:
        return tokens.mean(1)
    real = valid.bool()[..., None]  # (B, L, 1)
    return tokens.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
