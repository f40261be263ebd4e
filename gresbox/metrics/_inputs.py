"""What updates check: masks in pairs, flags, ids and scores; messages name the argument and never show contents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gresbox._checks import check_float, check_shape

__all__ = ["Ids", "Masks", "check_flags", "check_length", "check_masks", "check_numbers", "integers"]

Masks = Tensor | Sequence[Tensor]
Ids = Tensor | Sequence[int]


def check_masks(who: str, pred: Masks, target: Masks) -> None:
    """Same number of masks, pairwise of one size, all bool.

    Raises:
        ValueError: If numbers or sizes differ.
        TypeError: If a mask is not a bool tensor.
    """
    if isinstance(pred, Tensor) and isinstance(target, Tensor):
        check_shape(who, pred=(pred, "B H W"), target=(target, "B H W"))
        pairs = [("pred", pred), ("target", target)]
    else:
        check_length(who, "target", len(target), len(pred), "masks as `pred`")
        pairs = []
        for index, (one, other) in enumerate(zip(pred, target, strict=True)):
            names = (f"pred[{index}]", f"target[{index}]")
            check_shape(who, **{names[0]: (one, "H W"), names[1]: (other, "H W")})
            pairs += [(names[0], one), (names[1], other)]
    for name, mask in pairs:
        if mask.dtype != torch.bool:
            raise TypeError(f"{who}: `{name}` must be bool (logits > 0, probabilities > 0.5), got {mask.dtype}.")


def check_length(who: str, argument: str, length: int, expected: int, what: str) -> None:
    """One entry per sample.

    Raises:
        ValueError: If there are more or fewer.
    """
    if length != expected:
        raise ValueError(f"{who}: `{argument}` must be as many {what}, {expected}, got {length}.")


def check_flags(who: str, argument: str, flags: Tensor | None, count: int) -> None:
    """One bool per sample, or None.

    Raises:
        ValueError: If their number is not ``count``.
        TypeError: If they are not a bool tensor.
    """
    if flags is None:
        return
    if not isinstance(flags, Tensor):
        raise TypeError(f"{who}: `{argument}` must be a bool tensor, got {type(flags).__name__}.")
    if flags.dtype != torch.bool:
        raise TypeError(f"{who}: `{argument}` must be bool, got {flags.dtype}.")
    if tuple(flags.shape) != (count,):
        raise ValueError(f"{who}: `{argument}` must be (B,) with B={count}, got {tuple(flags.shape)}.")


def integers(who: str, argument: str, values: Ids, count: int) -> Tensor:
    """One integer per sample, ``(B,)`` int64.

    Raises:
        ValueError: If their number is not ``count``.
        TypeError: If they are not integers.
    """
    if not isinstance(values, Tensor):
        wrong = [type(value).__name__ for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
        if wrong:
            raise TypeError(f"{who}: `{argument}` must be integers, got {wrong[0]}.")
        values = torch.tensor([int(value) for value in values], dtype=torch.int64)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{who}: `{argument}` must be integers, got {values.dtype}.")
    if tuple(values.shape) != (count,):
        raise ValueError(f"{who}: `{argument}` must be (B,) with B={count}, got {tuple(values.shape)}.")
    return values.long()


def check_numbers(who: str, argument: str, values: Tensor, low: float | None = None, high: float | None = None) -> None:
    """Floating-point numbers without NaN, inside a range; reads the values, so it waits for the device.

    Raises:
        TypeError: If the tensor is not floating-point.
        ValueError: If a value is NaN or outside.
    """
    check_float(who, **{argument: values})
    inside = ~values.isnan()
    if low is not None:
        inside &= values >= low
    if high is not None:
        inside &= values <= high
    bad = int((~inside).sum())
    if bad:
        if low is None and high is None:
            expected = "numbers"
        else:
            expected = f"in [{low}, {high}]" if high is not None else f"at least {low}"
        raise ValueError(f"{who}: `{argument}` must be {expected}, got {bad} of {values.numel()} that are not.")
