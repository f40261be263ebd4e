"""The mask losses against golden values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import mask_bce, mask_dice


@pytest.mark.parametrize("case", ["hard", "soft", "empty_gt", "sat"])
@pytest.mark.parametrize(("function", "name"), [(mask_bce, "bce"), (mask_dice, "dice")])
def test_golden(golden, case, function, name):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("m2f_losses").items() if key.startswith(f"{case}/")}
    logits = data["logits"].requires_grad_()
    loss = function(logits, data["targets"]).sum() / data["num_masks"]
    torch.testing.assert_close(loss, data[name], rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], data[f"grad_{name}"], rtol=0, atol=1e-14)


@given(st.integers(0, 4), st.integers(1, 6), st.sampled_from([1.0, 100.0]))
def test_each_mask_on_its_own_and_any_order_of_pixels(count, pixels, scale):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks, targets = torch.randn(count, pixels) * scale, torch.rand(count, pixels) > 0.5
    order = torch.randperm(pixels)
    for function in (mask_bce, mask_dice):
        losses = function(masks, targets)
        assert losses.shape == (count,)
        assert (losses >= 0).all()
        torch.testing.assert_close(function(masks[:, order], targets[:, order].float()), losses)
        for index in range(count):
            torch.testing.assert_close(function(masks[index : index + 1], targets[index : index + 1])[0], losses[index])


def test_perfect_and_empty_masks():
    targets = torch.tensor([[True, False, False], [False, False, False]])
    masks = torch.where(targets, 200.0, -200.0).requires_grad_()
    assert (mask_bce(masks, targets) == 0).all()
    assert (mask_dice(masks, targets) == 0).all()
    total = (mask_bce(-masks, targets) + mask_dice(-masks, targets)).sum()
    assert total.isfinite()
    assert torch.autograd.grad(total, masks)[0].isfinite().all()


def test_without_pixels_both_are_zero():
    empty = torch.zeros(3, 0)
    assert torch.equal(mask_bce(empty, empty), torch.zeros(3))
    assert torch.equal(mask_dice(empty, empty), torch.zeros(3))


def test_errors():
    with pytest.raises(ValueError, match=r"^mask_bce: `targets` must be \(K, P\) with P=4, got \(2, 5\)\.$"):
        mask_bce(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"^mask_dice: `masks` must be a floating-point tensor, got torch\.bool\.$"):
        mask_dice(torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4))
