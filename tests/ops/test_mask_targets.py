"""Padded, area-averaged target masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gresbox.ops import mask_targets, stack_masks


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


@pytest.mark.parametrize("most_at_once", [1, 200, 1 << 24])
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([(8, 6), (4, 9)]), st.booleans()), min_size=1, max_size=6))
def test_images_that_are_averaged_together(most_at_once, images):
    torch.manual_seed(0)
    masks = [torch.rand(count, *size) for count, size, _ in images]
    masks = [mask > 0.5 if is_bool else mask for mask, (*_, is_bool) in zip(masks, images, strict=True)]
    padded, counts = stack_masks(masks, (4, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_targets, "MOST_AT_ONCE", most_at_once)
        pieces = mask_targets._pieces(masks)
        if padded.numel():
            together = mask_targets._stack_together(masks, counts.tolist(), (4, 3), torch.float32)
            assert torch.equal(together.view(padded.shape), padded)
    for piece in pieces:
        assert len({(masks[index].shape[1:], masks[index].dtype) for index in piece}) == 1
        assert len(piece) == 1 or sum(masks[index].numel() for index in piece) <= most_at_once
    assert sorted(index for piece in pieces for index in piece) == [index for index, mask in enumerate(masks) if len(mask)]


class Launches(TorchDispatchMode):
    """Names the operations that compute something, views aside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info for returned in func._schema.returns):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[10] * 32, [index % 11 for index in range(32)]])
def test_a_gpu_gets_few_launches(counts):
    masks = [torch.empty(count, 480, 480, dtype=torch.bool, device="meta") for count in counts]
    with Launches() as launches:
        padded, _ = stack_masks(masks, (120, 120))
    assert padded.shape == (32, 10, 120, 120)
    assert "aten::_adaptive_avg_pool2d" in launches.names
    assert len(launches.names) <= 17


def test_gradients_reach_masks_in_float():
    masks = [torch.rand(count, 4, 4, dtype=torch.float64, requires_grad=True) for count in (2, 0, 1)]
    out = stack_masks(masks, (2, 2), dtype=torch.float64)[0]
    together = mask_targets._stack_together(masks, [2, 0, 1], (2, 2), torch.float64).view(out.shape)
    for made in (out, together):
        first, last = torch.autograd.grad(made.sum(), [masks[0], masks[2]], retain_graph=True)
        assert (first == 0.25).all() and (last == 0.25).all()


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
