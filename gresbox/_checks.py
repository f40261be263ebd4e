"""Argument checks with one message style. They read shapes and dtypes only, so they cost microseconds and compile."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gresbox.structures import GresTarget, PaddedTargets

__all__ = ["check_choice", "check_count", "check_float", "check_float_dtype", "check_range", "check_shape", "check_targets"]


def check_shape(who: str, /, **named: tuple[Tensor, str]) -> dict[str, int]:
    """Check the shapes of several tensors at once; equal axis letters must have equal sizes.

    Args:
        who: The caller's public name; it opens the message.
        **named: ``argument=(tensor, "B N H W")``: an axis is a letter, bound at its first use, or a number that must be met.
            ``"*"`` takes any size.

    Returns:
        The size of each axis letter.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If a shape does not fit, as ``who: `argument` must be (B, N) with N=5, got (2, 4).``

    Example:
        >>> import torch
        >>> check_shape("f", x=(torch.zeros(2, 5), "B N"), y=(torch.zeros(2, 5, 3), "B N 3"))
        {'B': 2, 'N': 5}
        >>> check_shape("f", x=(torch.zeros(2, 5), "B N"), y=(torch.zeros(2, 4, 3), "B N 3"))
        Traceback (most recent call last):
        ...
        ValueError: f: `y` must be (B, N, 3) with N=5, got (2, 4, 3).
    """
    sizes: dict[str, int] = {}
    for argument, (tensor, spec) in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{who}: `{argument}` must be a tensor, got {type(tensor).__name__}.")
        axes = spec.split()
        shape = tensor.shape
        fits = len(axes) == len(shape)
        wrong = []
        if fits:
            for axis, size in zip(axes, shape, strict=True):
                if axis == "*":
                    continue
                if axis.isdigit():
                    fits = fits and size == int(axis)
                elif sizes.setdefault(axis, size) != size:
                    fits = False
                    wrong.append(f"{axis}={sizes[axis]}")
        if not fits:
            known = f" with {', '.join(wrong)}" if wrong else ""
            raise ValueError(f"{who}: `{argument}` must be ({', '.join(axes)}){known}, got {tuple(shape)}.")
    return sizes


def check_float(who: str, /, **named: Tensor) -> None:
    """Check that each tensor has a floating-point dtype.

    Raises:
        TypeError: If one has not.
    """
    for argument, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{who}: `{argument}` must be a floating-point tensor, got {tensor.dtype}.")


def check_float_dtype(who: str, argument: str, dtype: torch.dtype | None) -> None:
    """Check that a dtype that is asked for is a floating-point one; None passes.

    Raises:
        TypeError: If it is not.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{who}: `{argument}` must be a floating-point dtype such as torch.float32, got {dtype!r}.")


def check_choice(who: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: If it is not; the message lists the choices.
    """
    if value not in choices:
        raise ValueError(f"{who}: `{argument}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_range(who: str, argument: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Check that a number lies in ``[low, high]``; ``None`` leaves that side open. NaN fails.

    Raises:
        TypeError: If it is no number.
        ValueError: If it does not lie there.
    """
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{who}: `{argument}` must be a number, got {value!r}.")
    above = low is None or value >= low
    below = high is None or value <= high
    if not (above and below and value == value):
        if high is None:
            expected = f"at least {low}"
        elif low is None:
            expected = f"at most {high}"
        else:
            expected = f"in [{low}, {high}]"
        raise ValueError(f"{who}: `{argument}` must be {expected}, got {value}.")


def check_count(who: str, argument: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Check that a number is whole and lies in ``[low, high]``; ``None`` leaves that side open.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it does not lie there.
    """
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{who}: `{argument}` must be a whole number, got {value!r}.")
    check_range(who, argument, value, low, high)


def check_targets(who: str, targets: Sequence[GresTarget] | PaddedTargets, like: Tensor) -> None:
    """Check that there is one target per image, on the device of the prediction.

    Args:
        who: The caller's public name.
        targets: One target per image, or all of them padded.
        like: A tensor of the prediction, ``(B, ...)``.

    Raises:
        TypeError: If one is not a GresTarget.
        ValueError: If their number is not B or one is on another device.
    """
    padded = isinstance(getattr(targets, "masks", None), Tensor)
    each: Sequence[GresTarget | PaddedTargets] = [targets] if padded else targets  # type: ignore[list-item,assignment]
    wrong = [type(target).__name__ for target in each if not isinstance(getattr(target, "masks", None), Tensor)]
    if wrong:
        raise TypeError(f"{who}: `targets` must be a list of GresTarget, got {wrong[0]}.")
    if len(targets) != like.shape[0]:
        raise ValueError(f"{who}: `targets` must be one per image with B={like.shape[0]}, got {len(targets)}.")
    for target in each:
        if target.masks.device != like.device:
            raise ValueError(
                f"{who}: `targets` must be on {like.device} like the prediction, got {target.masks.device}; "
                "move them with target.to()."
            )
