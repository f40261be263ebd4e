"""Which form of an op runs: decided by a predicate before the call, never by trying. The only dispatch code of the library."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

from gresbox._checks import check_choice

__all__ = ["has_triton", "use_triton", "why_not_triton"]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; asking does not import it."""
    return importlib.util.find_spec("triton") is not None


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why a Triton kernel cannot run on these tensors, or None if it can.

    The environment variable ``GRESBOX_DISABLE_TRITON=1`` switches kernels off; ``TRITON_INTERPRET=1`` (tests without a GPU) lets
    them run on the CPU.

    Args:
        *tensors: The op's inputs.
    """
    if not has_triton():
        return "Triton is not installed"
    if os.environ.get("GRESBOX_DISABLE_TRITON", "0") not in ("", "0"):
        return "GRESBOX_DISABLE_TRITON is set"
    devices = sorted({str(tensor.device) for tensor in tensors})
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreted or (len(devices) == 1 and devices[0].startswith("cuda")):
        return None
    return f"inputs are on {' and '.join(devices)}, not on one CUDA device"


def use_triton(who: str, backend: str, *tensors: Tensor, kernel: bool = False) -> bool:
    """Check ``backend`` and say whether the op's Triton kernel runs.

    Args:
        who: The op's public name; it opens the message.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``.
        *tensors: The op's inputs.
        kernel: Whether the op has a kernel for these inputs.

    Raises:
        ValueError: If ``backend`` is not one of the three.
        RuntimeError: If ``"triton"`` is asked for and is not possible; the message says why.

    Example:
        >>> use_triton("align_phrases", "auto")
        False
        >>> use_triton("align_phrases", "triton")
        Traceback (most recent call last):
        ...
        RuntimeError: align_phrases: backend='triton' is not possible here: this op has no Triton kernel.
    """
    check_choice(who, "backend", backend, ("auto", "eager", "triton"))
    if backend == "eager":
        return False
    reason = why_not_triton(*tensors) if kernel else "this op has no Triton kernel"
    if reason is not None and backend == "triton":
        raise RuntimeError(f"{who}: backend='triton' is not possible here: {reason}.")
    return reason is None
