"""Early fusion: every pixel of a feature map reads the words before anything is decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gresbox._checks import check_range, check_shape
from gresbox.blocks.position import sine_position

__all__ = ["PixelWordFusion"]


class PixelWordFusion(nn.Module):
    r"""Each pixel attends to the words, and what it reads gates the pixel's own features.

    .. math:: G = W_w\,\mathrm{softmax}\!\left(\frac{(W_q V)(W_k T)^T}{\sqrt{C}}\right) W_v T,\qquad
              F = W_o\,(\mathrm{ReLU}(W_m V) \odot G),\qquad V' = V + \tanh(\mathrm{MLP}(F)) \odot F

    Paper: Yang et al., "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation", arXiv:2112.02244, Sec. 3.2-3.3
    (pixel-word attention and language gate). InstAlign's encoders meet no text before the decoder; this block is an option there.
    Differs from the paper: no instance normalisation of queries and words read, which on maps of a few pixels would remove what
    they hold.

    Args:
        dim: Channels ``C`` of the feature map.
        text_dim: Channels of the tokens.
        position: Add a sine table to the features that words are compared with and gate, so that "on the left" can be told from the
            first step on; ``dim`` must then be a multiple of 4. LAVT's pretrained backbone brings places along.

    Shape:
        - ``features``: ``(B, C, H, W)``; ``tokens``: ``(B, L, text_dim)``; ``valid``: ``(B, L)`` True on real tokens.
        - returns ``(B, C, H, W)``; without a valid token the features come back with a gate of what nothing says.

    Raises:
        ValueError: If a size is below 1, ``dim`` does not fit ``position``, or a shape does not fit.

    Example:
        >>> import torch
        >>> PixelWordFusion(8, 16)(torch.randn(2, 8, 4, 4), torch.randn(2, 5, 16)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, dim: int, text_dim: int, *, position: bool = False) -> None:
        super().__init__()
        check_range("PixelWordFusion", "dim", dim, 1)
        check_range("PixelWordFusion", "text_dim", text_dim, 1)
        if position and dim % 4:
            raise ValueError(f"PixelWordFusion: `dim` must be a multiple of 4 with position=True, got {dim}.")
        self.position = position
        self.q_proj, self.m_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = nn.Linear(text_dim, dim), nn.Linear(text_dim, dim)
        self.w_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh())

    def forward(self, features: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        check_shape("PixelWordFusion", features=(features, "B C H W"), tokens=(tokens, "B L T"))
        placed = features
        if self.position:
            height, width = features.shape[-2:]
            placed = features + sine_position(height, width, features.shape[1], device=features.device, dtype=features.dtype)
        rows = placed.flatten(2).transpose(1, 2)  # (B, P, C)
        if valid is not None:
            check_shape("PixelWordFusion", tokens=(tokens, "B L T"), valid=(valid, "B L"))
            tokens = tokens.masked_fill(~valid.bool()[..., None], 0.0)
        # What multiplies a pixel's query or the words it has read is multiplied with the few words instead of the many pixels;
        # for the latter that is the same because attention weights add up to 1.
        keys = self.k_proj(tokens)
        logits = rows @ (keys @ self.q_proj.weight).mT + (keys @ self.q_proj.bias)[:, None]  # (B, P, L)
        if valid is not None:
            # A row without any valid token reads zeros evenly instead of nothing at all.
            read = valid.bool() | ~valid.bool().any(-1, keepdim=True)
            logits = logits.masked_fill(~read[:, None], -torch.inf)
        words = (logits * rows.shape[-1] ** -0.5).softmax(-1) @ self.w_proj(self.v_proj(tokens))
        fused = self.out_proj(self.m_proj(rows).relu() * words)
        return features + (self.gate(fused) * fused).transpose(1, 2).unflatten(-1, features.shape[-2:])
