"""The kernels of deformable_attention: interpreted, with mistakes in them, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import deformable_attention
from gresbox.testing import TOLERANCES, relative_error

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
SHAPES = [(15, 15), (30, 30), (60, 60)]


def test_interpreted(run_interpreted):
    run_interpreted("deformable")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "select"),
    [
        ("(row * width + column) * step", "(row * height + column) * step", "usual"),
        ("size + 1.0)  #", "size - 1.0)  #", "centres"),  # beyond the last centre counts as on it
        ("to_right = right_share[:, None]", "to_right = 1.0 - right_share[:, None]", "usual"),
        ("probability * (seen - mean[:, None])", "probability * seen", "usual"),
        ("real = query < Q\n    head = (program // blocks) % heads\n    image = (program // blocks // heads).to(tl.int64)\n"
         "    channel = tl.arange(0, BLOCK_D)\n    known = channel < CHANNELS\n    # Within",
         "real = query < Q - 1\n    head = (program // blocks) % heads\n    image = (program // blocks // heads).to(tl.int64)\n"
         "    channel = tl.arange(0, BLOCK_D)\n    known = channel < CHANNELS\n    # Within",
         "usual"),
    ],
)  # fmt: skip
def test_a_mistake_is_caught(is_caught, old, new, select):
    assert is_caught("deformable", old, new, select)


def on_device(batch, queries, dtype, channels=32, points=4):
    """Points within and around the picture, but for pixels' centres: the gradient jumps there, and rounding would decide how."""
    value = torch.randn(batch, 4725, 8, channels, device="cuda").to(dtype)
    sizes = torch.tensor(SHAPES, device="cuda")[:, None].flip(-1)
    places = (torch.rand(batch, queries, 8, 3, points, 2, device="cuda") * 1.2 - 0.1) * sizes - 0.5
    locations = (places.floor() + (places - places.floor()).clamp(0.01, 0.99) + 0.5) / sizes
    return [x.requires_grad_() for x in (value, locations, torch.randn(locations.shape[:-1], device="cuda"))]


@on_gpu
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "queries", "channels", "points"), [(2, 4725, 32, 4), (3, 101, 24, 3), (1, 1, 256, 1)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu(batch, queries, channels, points, dtype, softmax, deterministic):
    leaves = on_device(batch, queries, dtype, channels, points)
    double = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(batch, queries, 8 * channels, device="cuda").to(dtype)
    want = deformable_attention(double[0], SHAPES, *double[1:], softmax=softmax, backend="eager")
    wanted = torch.autograd.grad(want, double, grad.double())
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = deformable_attention(leaves[0], SHAPES, *leaves[1:], softmax=softmax, backend="triton")
        grads = torch.autograd.grad(got, leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for out, ref in zip((got, *grads), (want, *wanted), strict=True):
        assert relative_error(out, ref) <= TOLERANCES[dtype]


@on_gpu
def test_on_a_gpu_nothing_waits_and_steps_are_captured():
    leaves = on_device(2, 100, torch.bfloat16)

    def step():
        out = deformable_attention(leaves[0], SHAPES, *leaves[1:], softmax=True)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    want = [value.detach() for value in step()]  # no graph of another stream may live on in a capture
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for out, ref in zip(found, want, strict=True):
        assert relative_error(out, ref) <= TOLERANCES[torch.bfloat16]


@on_gpu
def test_on_a_gpu_results_repeat_with_deterministic_algorithms():
    leaves = on_device(2, 4725, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = deformable_attention(leaves[0], SHAPES, *leaves[1:])
            runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
