"""How a kernel becomes an operator of PyTorch: one call defines the op, its backward op, their shapes and the autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gresbox.ops._backend import why_not_triton

__all__ = ["Forms", "define_op"]

_LIBRARY = torch.library.Library("gresbox", "FRAGMENT")


@dataclass(frozen=True)
class Forms:
    """The two ways to compute one op; which one runs is decided at each call, on any device.

    Args:
        plain: The best form in PyTorch; it also stands behind opcheck and gradcheck.
        kernel: Launches the Triton kernel; it imports ``gresbox.kernels`` inside. None: there is no kernel.
        refusal: Given the op's arguments, why the kernel cannot take them, or None. What holds for every kernel (device, float64,
            Triton's version) is asked before.
    """

    plain: Callable[..., Any]
    kernel: Callable[..., Any] | None = None
    refusal: Callable[..., str | None] | None = None


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    forward: Forms,
    backward: Forms | None = None,
    differentiable: Sequence[str] = (),
) -> Any:
    """Register ``gresbox::NAME`` and, with ``backward``, ``gresbox::NAME_backward``, and return the op to call.

    The backward op gets one gradient per output (zeros where an output is not used), all arguments of the forward op, and one flag
    per differentiable argument that says whether its gradient is needed. It returns their gradients in that order, contiguous, in
    the arguments' dtypes, None where not needed. Only inputs are saved; it cannot be differentiated a second time and says so.
    Autocast is off inside both.

    Args:
        schema: ``"name(Tensor x, Tensor? y, int size) -> Tensor"``; tensors in lists are not differentiable.
        fake: Given the arguments, the outputs' shapes and dtypes as empty tensors; outputs are contiguous and alias no input.
        forward: Forms of the op.
        backward: Forms of its backward op.
        differentiable: Names of the tensor arguments that have a gradient.

    Returns:
        The op, ``torch.ops.gresbox.NAME.default``.
    """
    name = schema[: schema.index("(")]
    op = _define(schema, fake, forward)
    if backward is None:
        return op
    arguments = op._schema.arguments
    places = [next(i for i, argument in enumerate(arguments) if argument.name == wanted) for wanted in differentiable]
    grads = ", ".join(f"Tensor grad_{index}" for index in range(len(op._schema.returns)))
    results = ", ".join(["Tensor"] * len(places))
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    backward_op = _define(
        f"{name}_backward({grads}, {inside}, bool[] needs) -> {results if len(places) == 1 else f'({results})'}",
        lambda *args: _filled(args, places, len(arguments), [None] * len(places)),
        _returning(backward, places, len(arguments)),
    )
    torch.library.register_autograd(
        f"gresbox::{name}", _differentiation(backward_op, places, len(arguments)), setup_context=_save, lib=_LIBRARY
    )
    torch.library.register_autograd(f"gresbox::{name}_backward", _refuse_twice(name), lib=_LIBRARY)
    return op


def _define(schema: str, fake: Callable[..., Any], forms: Forms) -> Any:
    """Register one op for the CPU, CUDA and ROCm devices and for tensors without data."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _implementation(forms), key)
    torch.library.register_fake(f"gresbox::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gresbox, name).default


def _implementation(forms: Forms) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        device = tensors[0].device
        with _no_autocast(device), _on(device):
            if forms.kernel is None or why_not_triton(*tensors) is not None:
                return forms.plain(*args)
            if forms.refusal is not None and forms.refusal(*args) is not None:
                return forms.plain(*args)
            return forms.kernel(*args)

    return run


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A backward pass may be called under autocast; entering a context costs more than asking."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the inputs'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _differentiation(backward_op: Any, places: list[int], count: int) -> Callable[..., Any]:
    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = [bool(ctx.needs_input_grad[place]) and arguments[place] is not None for place in places]
        found = backward_op(*grads, *arguments, needs)
        results: list[Tensor | None] = [None] * count
        for place, need, gradient in zip(places, needs, (found,) if len(places) == 1 else found, strict=True):
            results[place] = gradient if need else None
        return tuple(results)

    return differentiate


def _returning(forms: Forms, places: list[int], count: int) -> Forms:
    """Backward forms with an empty tensor in place of every gradient that is not needed."""

    def filling(form: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = form(*args)
            return _filled(args, places, count, [found] if isinstance(found, Tensor) else list(found))

        return run

    return Forms(filling(forms.plain), None if forms.kernel is None else filling(forms.kernel), forms.refusal)


def _filled(args: tuple[Any, ...], places: list[int], count: int, found: list[Tensor | None]) -> Any:
    """One tensor per differentiable argument: the gradient found; an empty one of no element where it is not needed."""
    arguments, needs = args[-1 - count : -1], args[-1]
    results = []
    for place, need, gradient in zip(places, needs, found, strict=True):
        like = arguments[place]
        if not need:
            gradient = (args[0] if like is None else like).new_empty((0,))
        elif gradient is None:  # shapes only are asked for
            gradient = like.new_empty(like.shape)
        results.append(gradient)
    return results[0] if len(results) == 1 else tuple(results)


def _refuse_twice(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{name}: the gradient has no gradient of its own here; use backend='eager' for a double backward.")

    return refuse
