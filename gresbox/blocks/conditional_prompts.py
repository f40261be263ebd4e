"""Conditional prompts: the picture as a handful of tokens that a text encoder reads along with the words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape
from gresbox.blocks.heads import MLP

__all__ = ["ConditionalPrompts"]


class ConditionalPrompts(nn.Module):
    r"""Turn a feature map into prompt tokens: the means of its cells on coarse grids, projected, plus a learned token each.

    .. math:: p_{g,i} = \mathrm{LN}\big(e_{g,i} + W_2^g\,\mathrm{ReLU}(W_1^g\,\mathrm{pool}_{g \times g}(F)_i + b_1^g) + b_2^g\big),
              \quad i = 1 \dots g^2

    Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117; the numbers
    are those of its released code, github.com/lsa1997/CARIS, ``model/backbones/backbones.py``.
    Differs from the paper: nothing; cells lie row by row, a coarser grid's before a finer one's.

    Args:
        visual_dim: Channels ``C`` of the feature map.
        text_dim: Channels ``D`` of the text encoder's tokens.
        grids: Cells per side of each grid; ``g`` gives ``g * g`` prompts.

    Shape:
        - ``visual``: ``(B, C, h, w)``; returns ``(B, K, D)`` with ``K`` the sum of the squared ``grids``.

    Raises:
        ValueError: If there is no grid, one is below 1, or the map's shape does not fit.

    Example:
        >>> import torch
        >>> ConditionalPrompts(16, 8)(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, visual_dim: int, text_dim: int, *, grids: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        if not grids:
            raise ValueError("ConditionalPrompts: `grids` must name at least one grid, got none.")
        for grid in grids:
            check_range("ConditionalPrompts", "grids", grid, 1)
        self.visual_dim = visual_dim
        self.grids = tuple(grids)
        self.projections = nn.ModuleList(MLP(visual_dim, text_dim, text_dim, num_layers=2) for _ in self.grids)
        self.prompt_tokens = nn.Parameter(torch.empty(sum(grid * grid for grid in self.grids), text_dim))
        self.norm = nn.LayerNorm(text_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released code's values: narrow normal projections, standard normal tokens."""
        nn.init.normal_(self.prompt_tokens)
        for layer in self.projections.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, visual: Tensor) -> Tensor:
        check_shape("ConditionalPrompts", visual=(visual, f"B {self.visual_dim} * *"))
        seen = [
            projection(F.adaptive_avg_pool2d(visual, grid).flatten(2).transpose(1, 2))
            for projection, grid in zip(self.projections, self.grids, strict=True)
        ]
        return self.norm(self.prompt_tokens + torch.cat(seen, dim=1))

    def extra_repr(self) -> str:
        return f"grids={self.grids}"
