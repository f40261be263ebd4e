"""Compare a computation with its reference: one tolerance table, used by our tests, our benchmarks and third parties."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "assert_matches_reference", "relative_error"]

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest allowed relative error, ``|out - ref| / |ref|`` in the 2-norm, of a result computed from inputs of that dtype."""


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|`` in float64; the norm of the difference where the reference is zero. NaN never passes as small."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    if out.shape != ref.shape:
        raise AssertionError(f"shape {tuple(out.shape)} differs from the reference's {tuple(ref.shape)}")
    if out.numel() == 0:
        return 0.0
    scale = ref.norm()
    error = (out - ref).norm() / (scale if scale > 0 else 1.0)
    return float("inf") if torch.isnan(error) else float(error)


def assert_matches_reference(
    function: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[object],
    *,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    tolerance: float | None = None,
) -> None:
    """Check outputs and all input gradients of ``function`` against ``reference`` in float64.

    The inputs are first rounded to ``dtype``; the reference gets exactly those values in float64. Gradients are taken of a fixed
    random weighting of all floating-point outputs.

    Args:
        function: What is tested.
        reference: The definition.
        inputs: Positional arguments; floating-point tensors are cast, everything else is passed on.
        dtype: Dtype of the tested computation.
        grad: Compare gradients too.
        tolerance: Overrides :data:`TOLERANCES`.

    Raises:
        AssertionError: With the name of the output or gradient and its error.

    Example:
        >>> import torch
        >>> assert_matches_reference(torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x)), [torch.randn(4, 3)])
    """
    limit = TOLERANCES[dtype] if tolerance is None else tolerance

    def run(call: Callable[..., Tensor | Sequence[Tensor]], kind: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
        arguments = []
        for value in inputs:
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach().to(dtype).to(kind).clone().requires_grad_(grad)
            arguments.append(value)
        result = call(*arguments)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not grad:
            return outputs, []
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros((), dtype=torch.float64)
        for out in outputs:
            if out.is_floating_point() and out.requires_grad:
                weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
                total = total + (out.double() * weight).sum().cpu()
        return outputs, list(torch.autograd.grad(total, leaves, allow_unused=True))

    got, got_grads = run(function, dtype)
    want, want_grads = run(reference, torch.float64)
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} outputs, the reference has {len(want)}")
    for index, (out, ref) in enumerate(zip(got, want, strict=True)):
        error = relative_error(out, ref)
        if not error <= limit:
            raise AssertionError(f"output {index}: relative error {error:.2e} above {limit:.0e} ({dtype})")
    for index, (out_grad, ref_grad) in enumerate(zip(got_grads, want_grads, strict=True)):
        if (out_grad is None) != (ref_grad is None):
            raise AssertionError(f"gradient of input {index}: only one of result and reference has one")
        if out_grad is not None and ref_grad is not None:
            error = relative_error(out_grad, ref_grad)
            if not error <= limit:
                raise AssertionError(f"gradient of input {index}: relative error {error:.2e} above {limit:.0e} ({dtype})")
