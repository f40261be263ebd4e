"""The kernels of matched_mask_losses: interpreted, with mistakes, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import matched_mask_losses
from gresbox.testing import assert_matches_reference

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_interpreted(run_interpreted):
    run_interpreted("mask_losses")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(both, _cross_entropy(masks, small, truth), 0.0)", "_cross_entropy(masks, small, truth)"),
        (
            "curve * (everywhere[:, None] - 2.0 * to_dice[:, None] * truth)",
            "curve * (everywhere[:, None] - to_dice[:, None] * truth)",
        ),
        ("(row // S)[:, None] * target_row\n    grad_at", "(row % S)[:, None] * target_row\n    grad_at"),
    ],
)
def test_a_mistake_is_caught(is_caught, old, new):
    assert is_caught("mask_losses", old, new, "test_losses_and_gradients")


def scene(steps, batch, most, side, channels=256):
    queries, pixels = (
        torch.randn(steps, batch, 100, channels, device="cuda"),
        torch.randn(batch, channels, side, side, device="cuda"),
    )
    counts = torch.randint(0, most + 1, (batch,))
    matches = torch.stack([torch.randperm(100)[:most] for _ in range(steps * batch)]).view(steps, batch, most)
    matches[:, torch.arange(most) >= counts[:, None]] = -1
    return queries / 16, pixels, torch.rand(batch, most, side, side, device="cuda"), matches.cuda()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(10, 3, 10, 37), (1, 2, 3, 120), (3, 2, 30, 20)])
def test_on_a_gpu(sizes, dtype):
    queries, pixels, targets, matches = scene(*sizes)
    for truth in (targets, targets > 0.5):
        assert_matches_reference(
            lambda q, v, truth=truth: matched_mask_losses(q, v, truth, matches, backend="triton"),
            lambda q, v, truth=truth: matched_mask_losses(q, v, truth, matches, backend="eager"),
            [queries, pixels],
            dtype=dtype,
        )


@on_gpu
@pytest.mark.parametrize("weight", [1.0, 2.0**-10])
def test_on_a_gpu_float16_keeps_small_gradients(float16_error, weight):
    assert float16_error(*scene(2, 2, 5, 60), weight) <= 2e-2


@on_gpu
def test_on_a_gpu_nothing_waits_and_nothing_changes():
    queries, pixels, targets, matches = scene(10, 4, 10, 60)
    queries.requires_grad_(), pixels.requires_grad_()

    def run():
        losses = torch.stack(matched_mask_losses(queries, pixels, targets, matches))
        return losses.detach(), *torch.autograd.grad(losses.sum(), (queries, pixels))

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
