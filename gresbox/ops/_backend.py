"""Which form of an op runs: decided by a predicate before the call, never by trying. The only dispatch code of the library."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from gresbox._checks import check_choice

__all__ = ["ADAPTERS", "ADAPTER_DEVICES", "OLDEST_TRITON", "has_triton", "use_triton", "why_not_adapter", "why_not_triton"]

OLDEST_TRITON = (3, 6)  # older ones abort the process, or spill, on some kernels

ADAPTERS = {"deformops": "deformops", "torch_linear_assignment": "torch-linear-assignment"}
"""Other people's kernels that can be asked for by name, and the packages that bring them."""

ADAPTER_DEVICES = {"deformops": "on CUDA", "torch_linear_assignment": "on the CPU and on CUDA"}
"""Where they run."""


def _triton_version() -> tuple[int, int] | None:
    """Triton's version, or None where it is not installed. Read from its source: an import is slow, its packages are many."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"__version__ *= *['\"](\d+)\.(\d+)", Path(spec.origin).read_text(encoding="utf-8"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


_TRITON = _triton_version()  # a constant, which torch.compile can see through


def has_triton() -> bool:
    """Whether Triton is installed; asking does not import it."""
    return _TRITON is not None


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why a Triton kernel cannot run on these tensors, or None if it can.

    The environment variable ``GRESBOX_DISABLE_TRITON=1`` switches kernels off; ``TRITON_INTERPRET=1`` (tests without a GPU) lets
    them run on the CPU.

    Args:
        *tensors: The op's inputs; none where there is no device to put any on.
    """
    if _TRITON is None:
        return "Triton is not installed"
    if _TRITON < OLDEST_TRITON:
        return f"Triton {'.'.join(map(str, _TRITON))} is installed and kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if os.environ.get("GRESBOX_DISABLE_TRITON", "0") not in ("", "0"):
        return "GRESBOX_DISABLE_TRITON is set"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "some input is float64 and kernels compute in float32"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return None
    if not tensors:
        return "there is no CUDA device here"
    if all(tensor.is_cuda and tensor.device == tensors[0].device for tensor in tensors):
        # What is compiled asks again when it runs.
        return None if torch.compiler.is_compiling() else _why_not_device(tensors[0].device.index)
    devices = sorted({str(tensor.device) for tensor in tensors})
    return f"inputs are on {' and '.join(devices)}, not on one CUDA device"


@functools.cache
def _why_not_device(index: int) -> str | None:
    """Why kernels do not run on a CUDA device: before Ampere there is no bfloat16, and less shared memory than they are given."""
    if torch.version.hip is not None or not torch.cuda.is_available():  # without a device, tensors without data are asked about
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"the device is an sm_{major}{minor} and kernels need sm_80 or newer"


def why_not_adapter(name: str) -> str | None:
    """Why the named adapter cannot be used, or None if it can; asking does not import it.

    Args:
        name: A key of :data:`ADAPTERS`.
    """
    if importlib.util.find_spec(name) is None:
        return f"it needs the package {ADAPTERS[name]}; pip install {ADAPTERS[name]}"
    return None


def use_triton(who: str, backend: str, *tensors: Tensor, kernel: bool | str = False, adapter: str | None = None) -> bool:
    """Check ``backend`` and say whether the op's Triton kernel runs.

    Args:
        who: The op's public name; it opens the message.
        backend: ``"auto"``, ``"eager"``, ``"triton"`` or the adapter.
        *tensors: The op's inputs.
        kernel: Whether the op has a kernel for these inputs; a string says why not.
        adapter: The key of :data:`ADAPTERS` that this op knows; the caller asks ``backend == adapter`` afterwards.

    Raises:
        ValueError: If ``backend`` is none of them.
        RuntimeError: If ``"triton"`` is asked for and is not possible; the message says why.
        ImportError: If the adapter is asked for and its package is not installed.

    Example:
        >>> use_triton("align_phrases", "auto")
        False
        >>> use_triton("align_phrases", "triton")
        Traceback (most recent call last):
        ...
        RuntimeError: align_phrases: backend='triton' is not possible here: this op has no Triton kernel.
    """
    check_choice(who, "backend", backend, ("auto", "eager", "triton", *([] if adapter is None else [adapter])))
    if backend == "eager":
        return False
    if backend == adapter:
        missing = why_not_adapter(adapter)
        if missing is not None:
            raise ImportError(f"{who}: backend={adapter!r} is not possible here: {missing}.")
        return False
    reason: str | None = kernel if isinstance(kernel, str) else "this op has no Triton kernel"
    if kernel is True:
        reason = why_not_triton(*tensors)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"{who}: backend='triton' is not possible here: {reason}.")
    return reason is None
