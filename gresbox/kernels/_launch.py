"""What every launch states: the kernel, its grid, its arguments by name and its settings; and how settings are chosen."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Launch", "architecture", "for_architecture"]

_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; ahead-of-time compilation reads the same object that a call runs.

    Args:
        kernel: The ``@triton.jit`` function.
        grid: Number of programs per axis; only the first axis may exceed 65,535.
        arguments: Every argument by name, constants included.
        warps: Warps per program.
        stages: Software pipelining of loops.
        fp_fusion: Whether a product and a sum may be rounded once; False where the bits decide between candidates.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2
    fp_fusion: bool = True

    def run(self) -> None:
        """Launch; an empty grid does nothing."""
        if 0 in self.grid:
            return
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fp_fusion}
        self.kernel[self.grid](**self.arguments, **options)


def architecture(tensor: Tensor) -> str:
    """``"sm_90"`` or ``"gfx942"``, of the tensor's device; ``"sm_80"`` for what runs interpreted on the CPU."""
    return _architecture(tensor.device.index) if tensor.is_cuda else "sm_80"


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def for_architecture(table: Mapping[str, _Settings], arch: str) -> _Settings:
    """The settings for an architecture from a table with the keys ``"sm_80"``, ``"sm_90"`` and ``"gfx942"``.

    Others take those of their kin: AMD's ``"gfx942"``; data-centre NVIDIA from Hopper on ``"sm_90"``; all else ``"sm_80"``, whose
    settings fit the 99 KB of shared memory of consumer cards.
    """
    if arch in table:
        return table[arch]
    if arch.startswith("gfx"):
        return table["gfx942"]
    return table["sm_90" if arch in ("sm_90", "sm_100", "sm_103") else "sm_80"]
