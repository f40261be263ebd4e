"""Padded, area-averaged target masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import stack_masks


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_means_of_blocks_and_zeros_behind(counts, height, width, factor):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks = [torch.rand(count, height * factor, width * factor) > 0.5 for count in counts]
    padded, number = stack_masks(masks, (height, width))
    assert padded.shape == (len(counts), max(counts), height, width)
    assert padded.dtype == torch.float32
    assert number.tolist() == counts
    assert number.dtype == torch.int64
    for image, mask in zip(padded, masks, strict=True):
        blocks = mask.float().unflatten(1, (height, factor)).unflatten(-1, (width, factor)).mean((2, 4))
        torch.testing.assert_close(image[: len(mask)], blocks)
        assert (image[len(mask) :] == 0).all()


def test_images_of_different_size_and_the_own_size():
    small, large = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(2, 8, 4, dtype=torch.bool)
    padded, _ = stack_masks([small, large], (4, 4), dtype=torch.bfloat16)
    assert padded.dtype == torch.bfloat16
    assert (padded[0, 0] == 1).all()
    assert padded[1].sum() == 0
    own, counts = stack_masks([large[:0], large[:1] | True])
    assert own.shape == (2, 1, 8, 4)
    assert own.sum() == 32
    assert counts.tolist() == [0, 1]


def test_no_instances_and_no_images():
    assert stack_masks([torch.zeros(0, 4, 4, dtype=torch.bool)] * 2, (2, 2))[0].shape == (2, 0, 2, 2)
    padded, counts = stack_masks([], (2, 2))
    assert padded.shape == (0, 0, 2, 2)
    assert counts.shape == (0,)


def test_compiles():
    torch._dynamo.reset()
    masks = [torch.rand(2, 4, 4) > 0.5, torch.zeros(0, 4, 4, dtype=torch.bool)]
    compiled = torch.compile(lambda m: stack_masks(m, (2, 2))[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(masks), stack_masks(masks, (2, 2))[0])


def test_errors():
    with pytest.raises(ValueError, match=r"^stack_masks: `masks\[1\]` must be \(M, H, W\), got \(4, 4\)\.$"):
        stack_masks([torch.zeros(1, 4, 4), torch.zeros(4, 4)])
    with pytest.raises(ValueError, match=r"`masks` must have one size when `size` is None, got \[\(2, 4\), \(4, 4\)\]"):
        stack_masks([torch.zeros(1, 4, 4), torch.zeros(1, 2, 4)])
    with pytest.raises(ValueError, match=r"`masks` must have one size when `size` is None, got \[\]"):
        stack_masks([])
