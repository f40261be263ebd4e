"""What the device can do at best, measured in the run whose times are compared with it: copies, products, gathers, launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clocks import CPUTimer

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Rates per second, and the seconds of a call that does nothing.

    ``copy_bytes``: read and written, far beyond all caches. ``matmul_<dtype>_flops``: of a large product, as PyTorch is set up.
    ``gather_bytes``: rows of 64 bytes read at random from 16 MB. ``launch_seconds``: of the smallest call, replayed from a graph
    on CUDA.
    """
    cuda = device.type == "cuda"
    found = {"copy_bytes": _copy(device)}
    for name in DTYPES[device.type]:
        found[f"matmul_{name}_flops"] = _product(getattr(torch, name), device)
    table = torch.randn(1 << 18, 16, device=device)
    rows = torch.randint(len(table), (1 << (22 if cuda else 17), 16), device=device)
    found["gather_bytes"] = rows.numel() * 64 / best(lambda: F.embedding_bag(rows, table, mode="sum"), device)
    found["launch_seconds"] = _launch(device)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def best(call: Callable[[], object], device: torch.device, *, rounds: int = 10, seconds: float = 1.0) -> float:
    """The shortest of several times: a ceiling is what was reached once."""
    call()
    times: list[float] = []
    while len(times) < rounds and sum(times) < seconds:
        _wait(device)
        start = CPUTimer.now()
        call()
        _wait(device)
        times.append(CPUTimer.now() - start)
    return min(times)


def _copy(device: torch.device) -> float:
    source = torch.ones((2 << 30) if device.type == "cuda" else (64 << 20), device=device)  # 8 GB, 256 MB
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), device)


def _product(dtype: torch.dtype, device: torch.device) -> float:
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: left @ right, device)


def _launch(device: torch.device) -> float:
    one = torch.zeros(1, device=device)
    calls = 200

    def many() -> Tensor:
        for _ in range(calls):
            one.add_(1)
        return one

    if device.type != "cuda":
        return best(many, device) / calls
    many()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return best(graph.replay, device) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
