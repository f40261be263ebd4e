"""How a kernel becomes an operator of PyTorch: one call defines the op, its backward op, their shapes and the autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gresbox.ops._backend import why_not_triton
from gresbox.ops._first_order import second_order_refused

__all__ = ["Forms", "define_op"]

_LIBRARY = torch.library.Library("gresbox", "FRAGMENT")
_HOME: dict[str, str] = {}  # the module that defines an op: one that is executed again gets the op that is there


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


@dataclass(frozen=True)
class _Layout:
    """Where the backward op finds its arguments: gradients, then those of the forward op, then kept outputs, then the flags."""

    places: tuple[int, ...]  # of the differentiable ones among the forward op's arguments
    count: int  # of the forward op's arguments
    outputs: int
    auxiliary: tuple[int, ...]

    def arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        start = self.outputs - len(self.auxiliary)
        return args[start : start + self.count]


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    forward: Forms,
    backward: Forms | None = None,
    differentiable: Sequence[str] = (),
    auxiliary: Sequence[int] = (),
) -> Any:
    """Register ``gresbox::NAME`` and, with ``backward``, ``gresbox::NAME_backward``, and return the op to call.

    The backward op gets one gradient per output (zeros where an output is not used), all arguments of the forward op, its auxiliary
    outputs, and a list with one flag per differentiable argument that says whether its gradient is needed. It returns their
    gradients in that order, contiguous, in the arguments' dtypes, None where not needed. Inputs are saved, and of the outputs only
    the auxiliary ones. It cannot be differentiated a second time and says so. Autocast is off inside both.

    Args:
        schema: ``"name(Tensor x, Tensor? y, int size) -> Tensor"``; tensors in lists are not differentiable.
        fake: Given the arguments, the outputs' shapes and dtypes as empty tensors; outputs are contiguous and alias no input.
        forward: Forms of the op.
        backward: Forms of its backward op.
        differentiable: Names of the tensor arguments that have a gradient.
        auxiliary: Places of the outputs that only the backward op reads; they have no gradient.

    Returns:
        The op, ``torch.ops.gresbox.NAME.default``.
    """
    name = schema[: schema.index("(")]
    if _HOME.get(name) == forward.plain.__module__:
        return getattr(torch.ops.gresbox, name).default
    op = _define(schema, fake, forward)
    _HOME[name] = forward.plain.__module__
    if backward is None:
        return op
    names, outputs = [argument.name for argument in op._schema.arguments], len(op._schema.returns)
    layout = _Layout(tuple(map(names.index, differentiable)), len(names), outputs, tuple(auxiliary))
    grads = [f"Tensor grad_{index}" for index in range(outputs) if index not in auxiliary]
    kept = [f"Tensor kept_{index}" for index in auxiliary]
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    results = "Tensor" if len(differentiable) == 1 else f"({', '.join(['Tensor'] * len(differentiable))})"
    backward_op = _define(
        f"{name}_backward({', '.join([*grads, inside, *kept, 'bool[] needs'])}) -> {results}",
        lambda *args: _filled(args, layout, [None] * len(layout.places)),
        _returning(backward, layout),
    )
    differentiate, save = _differentiation(backward_op, layout), _saving(layout)
    torch.library.register_autograd(f"gresbox::{name}", differentiate, setup_context=save, lib=_LIBRARY)
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


def _saving(layout: _Layout) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else output
        kept = [outputs[index] for index in layout.auxiliary]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # what is kept may be large, and zeros of its shape would be made for nothing
        ctx.like = [(out.shape, out.dtype, out.device) for out in _without(outputs, layout.auxiliary)]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *kept)
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    return save


def _differentiation(backward_op: Any, layout: _Layout) -> Callable[..., Any]:
    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = [bool(ctx.needs_input_grad[place]) and arguments[place] is not None for place in layout.places]
        read = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(_without(grads, layout.auxiliary), ctx.like, strict=True)
        ]
        found = backward_op(*read, *arguments, *saved, needs)
        results: list[Tensor | None] = [None] * layout.count
        for place, need, gradient in zip(layout.places, needs, (found,) if len(needs) == 1 else found, strict=True):
            results[place] = gradient if need else None
        return tuple(results)

    return differentiate


def _without(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [value for index, value in enumerate(values) if index not in places]


def _returning(forms: Forms, layout: _Layout) -> Forms:
    """Backward forms with an empty tensor in place of every gradient that is not needed."""

    def filling(form: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = form(*args)
            return _filled(args, layout, [found] if isinstance(found, Tensor) else list(found))

        return run

    return Forms(filling(forms.plain), None if forms.kernel is None else filling(forms.kernel), forms.refusal)


def _filled(args: tuple[Any, ...], layout: _Layout, found: list[Tensor | None]) -> Any:
    """One tensor per differentiable argument: the gradient found; an empty one of no element where it is not needed."""
    arguments, results = layout.arguments(args), []
    for place, need, gradient in zip(layout.places, args[-1], found, strict=True):
        like = arguments[place]
        if not need:
            gradient = (args[0] if like is None else like).new_empty((0,))
        elif gradient is None:  # shapes only are asked for
            gradient = like.new_empty(like.shape)
        results.append(gradient)
    return results[0] if len(results) == 1 else tuple(results)


def _refuse_twice(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise second_order_refused(name)

    return refuse
