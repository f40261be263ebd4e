from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.losses import CarisCriterion, weighted_cross_entropy
from gresbox.structures import GresOutput, GresTarget
from gresbox.testing import assert_matches_reference


def target_of(mask):
    return GresTarget(mask.bool()[None])


def test_golden_loss_and_gradient_of_the_released_code(golden):
    arrays = {name: torch.from_numpy(value) for name, value in golden("aml_official_loss").items()}
    pred = arrays["pred"].requires_grad_()
    output = GresOutput(pred[:, 1] - pred[:, 0], align_corners=True)
    losses = CarisCriterion(class_weights=tuple(arrays["weight"].tolist()))(output, [target_of(mask) for mask in arrays["target"]])
    torch.testing.assert_close(losses["loss"].double(), arrays["loss"], atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(losses["loss"], pred)
    torch.testing.assert_close(grad, arrays["grad"], atol=1e-7, rtol=1e-5)


def two_logits(reduction, weights):
    """torch's own cross-entropy of two logits per pixel, of which the first may be anything."""

    def loss(logits, targets):
        offset = torch.linspace(-3, 3, logits.shape[-1], dtype=logits.dtype).expand_as(logits)
        pair = torch.stack([offset, logits + offset], dim=1)
        weight = torch.tensor(weights, dtype=logits.dtype)
        parts = [(pair, targets)] if reduction == "batch" else list(zip(pair.split(1), targets.split(1), strict=True))
        return torch.stack([F.cross_entropy(p, t.long(), weight=weight) for p, t in parts]).mean()

    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_outputs_and_gradients(reduction, dtype):
    weights = (0.9, 1.1)
    inputs = [torch.randn(3, 5, 7) * 4, torch.rand(3, 5, 7) > 0.7]
    function = lambda z, y: weighted_cross_entropy(z, y, class_weights=weights, reduction=reduction)  # noqa: E731
    assert_matches_reference(function, two_logits(reduction, weights), inputs, dtype=dtype)
    assert function(inputs[0].to(dtype), inputs[1]).dtype == torch.promote_types(dtype, torch.float32)


@given(batch=st.integers(1, 4), empty=st.booleans(), scale=st.sampled_from([0.1, 1.0, 200.0]))
def test_it_is_positive_finite_and_has_a_gradient_everywhere(batch, empty, scale):
    logits = (torch.randn(batch, 4, 6) * scale).requires_grad_()
    targets = torch.zeros(batch, 4, 6) if empty else (torch.rand(batch, 4, 6) > 0.5).float()
    for reduction in ("batch", "sample"):
        loss = weighted_cross_entropy(logits, targets, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and loss >= 0 and grad.isfinite().all()
    assert torch.equal(grad.sign()[grad != 0], (0.5 - targets).sign()[grad != 0]), "towards the truth"


@given(seed=st.integers(0, 100))
def test_micro_batches_average_to_the_batch_with_a_mean_per_sample(seed):
    torch.manual_seed(seed)
    logits, targets = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 3, 5) > 0.6
    whole = weighted_cross_entropy(logits, targets, reduction="sample")
    halves = [weighted_cross_entropy(logits[i : i + 2], targets[i : i + 2], reduction="sample") for i in (0, 2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_equal_weights_are_plain_binary_cross_entropy():
    logits, targets = torch.randn(2, 4, 4, dtype=torch.float64), torch.rand(2, 4, 4, dtype=torch.float64)
    for reduction in ("batch", "sample"):
        loss = weighted_cross_entropy(logits, targets, class_weights=(1.0, 1.0), reduction=reduction)
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, targets))


def test_the_criterion_is_float32_under_autocast_and_resizes_the_models_way():
    merged, mask = torch.randn(2, 4, 4), torch.rand(2, 10, 14) > 0.5
    targets = [target_of(one) for one in mask]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = CarisCriterion()(GresOutput(merged.bfloat16()), targets)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert losses["loss"] == losses["merged_ce"]
    for corners in (False, True):
        resized = F.interpolate(merged[:, None], (10, 14), mode="bilinear", align_corners=corners)[:, 0]
        loss = CarisCriterion()(GresOutput(merged, align_corners=corners), targets)["loss"]
        torch.testing.assert_close(loss, weighted_cross_entropy(resized, mask))


def test_no_target_is_a_picture_of_background():
    merged = torch.randn(1, 4, 4)
    loss = CarisCriterion()(GresOutput(merged), [GresTarget(torch.zeros(0, 4, 4, dtype=torch.bool))])["loss"]
    torch.testing.assert_close(loss, F.softplus(merged).mean())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CarisCriterion(class_weights=(0.0, 1.0)), ValueError, "CarisCriterion: `class_weights` must be at least"),
        (lambda: CarisCriterion(class_weights=(1.0, 1.0, 1.0)), ValueError, "`class_weights` must be two numbers"),
        (
            lambda: CarisCriterion(reduction="sum"),
            ValueError,
            "CarisCriterion: `reduction` must be one of 'batch', 'sample', got 'sum'",
        ),
        (
            lambda: weighted_cross_entropy(torch.ones(1, 2, 2), torch.ones(1, 2, 3)),
            ValueError,
            r"`targets` must be \(B, H, W\) with W=2",
        ),
        (
            lambda: weighted_cross_entropy(torch.ones(1, 2, 2).long(), torch.ones(1, 2, 2)),
            TypeError,
            "`logits` must be a floating-point",
        ),
        (
            lambda: CarisCriterion()(GresOutput(torch.zeros(2, 4, 4)), [target_of(torch.ones(4, 4))]),
            ValueError,
            "CarisCriterion: `targets` must be one per image with B=2, got 1",
        ),
        (
            lambda: CarisCriterion()(GresOutput(torch.zeros(2, 4, 4)), [target_of(torch.ones(4, 4)), target_of(torch.ones(4, 5))]),
            ValueError,
            "CarisCriterion: `targets` must all have one image size",
        ),
        (lambda: CarisCriterion()(GresOutput(torch.zeros(1, 4, 4)), [None]), TypeError, "`targets` must be a list of GresTarget"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
