"""The kernels of ``align_phrases``: interpreted, with mistakes in them, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import align_phrases
from gresbox.testing import assert_matches_reference

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_interpreted(run_interpreted):
    run_interpreted("phrase_alignment")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0 * to_length[:, None] * phrase", "0.0 * to_length[:, None] * phrase"),  # the phrases' length is constant
        ("hidden = tl.where(real[None, :], logits * scale", "hidden = tl.where(word[None, :] >= 0, logits * scale"),
        ("2.0 * to_length[:, None] * along", "to_length[:, None] * along"),
    ],
)
def test_a_mistake_is_caught(is_caught, old, new):
    assert is_caught("phrase_alignment", old, new, "odd_sizes")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "length"), [(100, 20), (37, 128), (1, 1)])
def test_on_a_gpu(dtype, count, length):
    valid = torch.rand(6, length, device="cuda") > 0.3
    assert_matches_reference(
        lambda q, t: align_phrases(q, t, valid, backend="triton"),
        lambda q, t: align_phrases(q, t, valid, backend="eager"),
        [torch.randn(6, count, 256, device="cuda"), torch.randn(6, length, 256, device="cuda")],
        dtype=dtype,
    )


@on_gpu
def test_on_a_gpu_nothing_waits_and_bits_repeat():
    leaves = [
        torch.randn(18, 100, 256, device="cuda", requires_grad=True),
        torch.randn(18, 20, 256, device="cuda", requires_grad=True),
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (torch.autograd.grad(align_phrases(*leaves, backend="triton")[0].sum(), leaves) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
