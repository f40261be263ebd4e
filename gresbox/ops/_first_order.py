"""Gradients that have no gradient of their own and say so: without it a second derivative would be zero in silence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order", "refuse_second_of", "second_order_refused"]

_Gradients = Sequence[Tensor | None]


def second_order_refused(who: str) -> RuntimeError:
    """The error of a double backward; every op that refuses one has a form with plain autograd."""
    return RuntimeError(f"{who}: the gradient has no gradient of its own here; use backend='eager' for a double backward.")


def refuse_second_of(who: str, result: Tensor) -> Tensor:
    """The result of an op of PyTorch whose gradient has none; PyTorch says so too, but neither who asked nor what to do.

    Args:
        who: The op's public name; it opens the message.
        result: What PyTorch's op returned.
    """
    if not torch.compiler.is_compiling() and result.grad_fn is not None:
        result.grad_fn.register_hook(lambda found, given: _refuse_second(who, found))
    return result


class _Refusal(torch.autograd.Function):
    """The first ``count`` tensors, with all of them as their origin; what asks for their gradient is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(who: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.who = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_order_refused(ctx.who)


def _refuse_second(who: str, gradients: _Gradients, origins: _Gradients = ()) -> _Gradients:
    """Gradients as they are; where a graph of them is made, whoever wants theirs is refused, whatever their origins are."""
    return _Refusal.apply(who, len(gradients), *gradients, *origins) if torch.is_grad_enabled() else gradients


def first_order(who: str) -> Callable[..., Any]:
    """Decorate the ``backward(ctx, saved, *grads)`` of an autograd Function that saves its inputs: autograd does not look into it.

    PyTorch's own ``once_differentiable`` raises only where the incoming gradients are part of a graph, and theirs often are not.

    Args:
        who: The op's public name; it opens the message.
    """

    def decorate(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> _Gradients:
            saved = ctx.saved_tensors  # once: under checkpointing a second look is an error
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            return _refuse_second(who, found, (*grads, *saved))

        return run

    return decorate
