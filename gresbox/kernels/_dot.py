"""Matrix products inside kernels; nothing else calls ``tl.dot``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["dot", "dot_precision"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b`` in float32. The interpreter multiplies bfloat16 as if it were integers, so there both are widened first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def dot_precision(*dtypes: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch's own matrix products are set to; 16-bit operands do not read it."""
    if torch.float32 not in dtypes:
        return "ieee"
    # The older ways to ask raise once somebody has set this one.
    own, common = (getattr(settings, "fp32_precision", "none") for settings in (torch.backends.cuda.matmul, torch.backends))
    return "tf32" if (common if own == "none" else own) == "tf32" else "ieee"
