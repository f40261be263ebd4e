"""The kernel of select_points: interpreted, with mistakes, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import select_points

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


def test_interpreted(run_interpreted):
    run_interpreted("point_selection")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('        score = tl.where(cell == best, float("-inf"), score)\n', ""),
        ("nearest = tl.minimum(nearest, down * down + across * across)", "nearest = down * down + across * across"),
        ("best = tl.argmax(total, 0, tie_break_left=True)", "best = CELLS - 1 - tl.argmax(tl.flip(total, 0), 0)"),
    ],
)
def test_a_mistake_is_caught(is_caught, old, new):
    assert is_caught("point_selection", old, new)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("side", "count"), [(20, 10), (60, 20), (90, 20)])
def test_on_a_gpu_indices_are_the_definitions(side, count, dtype):
    score_map = torch.randn(8, side, side, device="cuda").to(dtype)
    flat = torch.zeros(2, side, side, device="cuda")
    for scores in (score_map, score_map.mT, flat, (score_map > 1).to(dtype)):
        for weight in (0.003, 0.5):
            got, want = (select_points(scores, count, distance_weight=weight, backend=backend) for backend in ("triton", "eager"))
            assert torch.equal(got, want)


@on_gpu
def test_on_a_gpu_nothing_waits():
    score_map = torch.randn(8, 20, 20, device="cuda")
    select_points(score_map, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_points(score_map, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
