"""Sine position tables for feature maps and for token sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gresbox._checks import check_shape

__all__ = ["sine_position", "sine_position_1d"]


def sine_position(
    height: int,
    width: int,
    dim: int,
    *,
    valid: Tensor | None = None,
    normalize: bool = True,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Two-dimensional sine position table: ``dim / 2`` channels for the row, then ``dim / 2`` for the column.

    .. math:: e_{2j}(y) = \sin\frac{\tilde y}{t^{4j/C}},\quad e_{2j+1}(y) = \cos\frac{\tilde y}{t^{4j/C}},\quad
              \tilde y = 2\pi\,\frac{y}{H + 10^{-6}},\; y = 1 \dots H

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.2.2 (the
    table of DETR).
    Differs from the paper: nothing.

    Args:
        height: Rows ``H``.
        width: Columns ``W``.
        dim: Channels ``C``, a multiple of 4.
        valid: True on real pixels; positions then count real pixels only. None: every pixel is real.
        normalize: Divide by the last position and multiply by two pi, so that a table does not depend on the resolution.
        temperature: The base ``t`` of the frequencies.
        device: Where the table is built; ``valid``'s device when that is given.
        dtype: The table's dtype; it is computed in float32, or float64 for float64.

    Shape:
        - ``valid``: ``(B, H, W)``; returns ``(C, H, W)``, or ``(B, C, H, W)`` with ``valid``.

    Raises:
        ValueError: If ``dim`` is not a multiple of 4.

    Example:
        >>> sine_position(3, 5, 8).shape
        torch.Size([8, 3, 5])
    """
    if dim % 4:
        raise ValueError(f"sine_position: `dim` must be a multiple of 4, got {dim}.")
    compute = torch.promote_types(dtype, torch.float32)
    if valid is None:
        y = torch.arange(1, height + 1, device=device, dtype=compute)[:, None]  # (H, 1)
        x = torch.arange(1, width + 1, device=device, dtype=compute)[None, :]  # (1, W)
        size: tuple[int, ...] = (height, width)
    else:
        check_shape("sine_position", valid=(valid, f"B {height} {width}"))
        y, x = valid.to(compute).cumsum(-2), valid.to(compute).cumsum(-1)  # (B, H, W)
        size = tuple(valid.shape)
    if normalize:
        y = y / (y[..., -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[..., :, -1:] + 1e-6) * (2 * math.pi)
    half = dim // 2
    rows = _waves(y, half, temperature).expand(*size, half)
    columns = _waves(x, half, temperature).expand(*size, half)
    return torch.cat([rows, columns], dim=-1).movedim(-1, -3).to(dtype)


def sine_position_1d(
    length: int,
    dim: int,
    *,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""One-dimensional sine position table of a token sequence, positions 0 to ``L - 1``.

    .. math:: e_{2j}(l) = \sin(l / t^{2j/C}),\quad e_{2j+1}(l) = \cos(l / t^{2j/C})

    Paper: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, Sec. 3.5.
    Differs from the paper: nothing.

    Args:
        length: Tokens ``L``.
        dim: Channels ``C``, even.
        temperature: The base ``t`` of the frequencies.
        device: Where the table is built.
        dtype: The table's dtype; it is computed in float32, or float64 for float64.

    Shape:
        - returns ``(L, C)``. A token's row does not depend on ``L``, so padding on the right changes nothing.

    Raises:
        ValueError: If ``dim`` is odd.

    Example:
        >>> sine_position_1d(2, 4)[0]
        tensor([0., 1., 0., 1.])
    """
    if dim % 2:
        raise ValueError(f"sine_position_1d: `dim` must be even, got {dim}.")
    position = torch.arange(length, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return _waves(position, dim, temperature).to(dtype)


def _waves(position: Tensor, dim: int, temperature: float) -> Tensor:
    """Sines and cosines, interleaved, of each position at ``dim / 2`` frequencies: ``(...) -> (..., dim)``."""
    exponent = torch.arange(dim // 2, device=position.device, dtype=position.dtype) * (2.0 / dim)
    angle = position[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
