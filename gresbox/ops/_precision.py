"""How ops treat dtypes: autocast is ignored, sums are made in float32 or wider, validity flags become bool."""

from __future__ import annotations

import torch
from torch import Tensor

from gresbox._checks import check_float, check_shape

__all__ = ["accumulation_dtype", "no_autocast", "real_tokens"]


def accumulation_dtype(who: str, /, **named: Tensor) -> torch.dtype:
    """The widest of float32 and the dtypes of the named floating-point arguments; other dtypes are a TypeError."""
    check_float(who, **named)
    dtype = torch.float32
    for tensor in named.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(tensor: Tensor) -> torch.autocast:
    """The context in which ops compute, so that a caller's autocast does not lower their precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def real_tokens(who: str, valid: Tensor | None, tokens: Tensor) -> Tensor:
    """``valid`` as bool, ``(B, L)``, True on real tokens; None means that all are real.

    Args:
        who: The caller's public name; it opens the message.
        valid: Bool, 0/1 integers (a tokenizer's attention mask) or None.
        tokens: Any tensor whose first axis is B and whose second to last axis is L.

    Raises:
        TypeError: If ``valid`` is floating-point.
        ValueError: If its shape is not ``(B, L)``.
    """
    batch, length = tokens.shape[0], tokens.shape[-2]
    if valid is None:
        return torch.ones((batch, length), dtype=torch.bool, device=tokens.device)
    sizes = check_shape(who, valid=(valid, "B L"))
    if sizes != {"B": batch, "L": length}:
        raise ValueError(f"{who}: `valid` must be (B, L) with B={batch}, L={length}, got {tuple(valid.shape)}.")
    if valid.is_floating_point():
        raise TypeError(f"{who}: `valid` must be bool or 0/1 integers, got {valid.dtype}.")
    return valid if valid.dtype == torch.bool else valid != 0
