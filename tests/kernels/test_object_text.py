"""The kernels of ``cross_attend_both``: interpreted, with mistakes in them, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import cross_attend_both
from gresbox.testing import assert_matches_reference

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_interpreted(run_interpreted):
    run_interpreted("object_text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("read = dot(_over_words(affinity, allowed)", "read = dot(_over_words(affinity, spoken)"),
        ("to_words = dot(tl.trans(weight), v_o, to_words * shrunk[:, None]", "to_words = dot(tl.trans(weight), v_o, to_words"),
        ("inner = inner * shrunk + tl.sum", "inner = inner + tl.sum"),  # earlier blocks are not brought to the new largest logit
    ],
)
def test_a_mistake_is_caught(is_caught, old, new):
    assert is_caught("object_text", old, new, "odd_sizes")


def gpu_case(count, length, dim):
    rows = (count, length, length, length, count, count)
    return [torch.randn(4, size, 8, dim, device="cuda").transpose(1, 2) for size in rows]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "length", "dim"), [(100, 20, 32), (300, 64, 16), (1, 1, 16)])
def test_on_a_gpu(dtype, count, length, dim):
    valid = torch.rand(4, length, device="cuda") > 0.3
    inputs = gpu_case(count, length, dim)

    def parallel(backend):
        return lambda *x: cross_attend_both(*x, valid, backend=backend)

    def shared(backend):
        return lambda q, k, v_t, v_o: cross_attend_both(q, k, v_t, k, q, v_o, valid, backend=backend)

    assert_matches_reference(parallel("triton"), parallel("eager"), inputs, dtype=dtype)
    assert_matches_reference(shared("triton"), shared("eager"), [inputs[index] for index in (0, 1, 2, 5)], dtype=dtype)


@on_gpu
def test_on_a_gpu_nothing_waits_and_bits_repeat():
    leaves = [leaf.requires_grad_() for leaf in gpu_case(100, 20, 32)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [cross_attend_both(*leaves, backend="triton") for _ in range(2)]
        first, second = (torch.autograd.grad(objects.sum() + words.sum(), leaves) for objects, words in found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
