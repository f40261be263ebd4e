"""Where this process stands among those that train or evaluate together."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

__all__ = ["gather_objects", "own_device", "process_rank", "same_everywhere", "start_accelerator", "world_size"]


def world_size() -> int:
    """Number of processes that work together; 1 outside ``torchrun`` and ``accelerate launch``."""
    return torch.distributed.get_world_size() if _distributed() else 1


def process_rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if _distributed() else 0


def gather_objects(item: Any) -> list[Any]:
    """One item per process, in their order, on every process."""
    if not _distributed():
        return [item]
    items: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def same_everywhere(value: Any) -> Any:
    """What the first process holds, on every process: clocks differ, decisions must not."""
    if not _distributed():
        return value
    items = [value]
    torch.distributed.broadcast_object_list(items)
    return items[0]


def own_device(*, cpu: bool = False) -> torch.device:
    """The device of this process, which joins the others first if it was launched with others; alone it needs no accelerate.

    Args:
        cpu: Stay on the CPU where there is a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return start_accelerator(cpu=cpu).device
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def start_accelerator(amp: str = "no", *, cpu: bool = False) -> Any:
    """A Hugging Face accelerator for a mixed precision, joining the other processes if this one was launched with others.

    Args:
        amp: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: Stay on the CPU where there is a GPU.

    Raises:
        ImportError: If accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("train: training needs accelerate; install it with pip install 'gresbox[train]'.") from error
    if AcceleratorState._shared_state:  # one process may train twice: with another precision, or on another device
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        AcceleratorState._reset_state(reset_partial_state=alone)
    # A depth-wise convolution's gradient has other strides than its bucket: a matter of speed that nobody can change.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=amp, cpu=cpu, kwargs_handlers=[buckets])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
