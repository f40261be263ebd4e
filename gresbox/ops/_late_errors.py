"""Findings of a kernel that the host hears of later, because nothing waits for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LateError", "hand_over", "raise_finished"]

Report = Callable[[Tensor], None]


class LateError(ValueError):
    """An earlier call was given something wrong; its kernel found it, and the present call's arguments say nothing about it."""


_waiting: deque[tuple[torch.cuda.Event, Tensor, Report]] = deque()


def hand_over(flags: Tensor, report: Report) -> None:
    """Let ``report`` see a copy of ``flags`` on the host, once it has arrived there.

    A CUDA graph is captured without: its replays report nothing. The copies' pinned memory is that of PyTorch's caching host
    allocator, which uses it again once a copy has arrived and been reported, so that only the first calls ask the driver for some.

    Args:
        flags: What the kernel found, on a CUDA device.
        report: Raises or warns where some flag is set; it runs within a later call.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    _waiting.append((arrived, copy, report))


def raise_finished() -> None:
    """Report all that has arrived since the last call, without waiting for the rest; nothing while a CUDA graph is captured.

    To ask an event during a capture, even one of before, would break the capture.
    """
    if not _waiting or torch.cuda.is_current_stream_capturing():
        return
    while _waiting and _waiting[0][0].query():
        _, flags, report = _waiting.popleft()
        report(flags)
