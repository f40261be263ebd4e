from __future__ import annotations

import pytest
import torch

from gresbox.blocks import AdaptiveInstanceAggregation
from gresbox.structures import InstancePrediction


@pytest.mark.parametrize("case", ["scalar", "zero_slope", "identity", "per_query", "saturated"])
def test_golden(golden, case):
    arrays = {key.split("/")[1]: torch.from_numpy(value) for key, value in golden("instalign_aia").items() if key.startswith(case)}
    slope = arrays["slope"]
    aggregation = AdaptiveInstanceAggregation(num_queries=slope.numel() if slope.dim() else None).double()
    with torch.no_grad():
        aggregation.slope.copy_(slope)
    scores, masks = arrays["score_logit"].requires_grad_(), arrays["mask_logit"].requires_grad_()
    z = aggregation(masks, scores.sigmoid())
    torch.testing.assert_close(z, arrays["z"])
    assert torch.equal(z > 0, arrays["mask"])
    probability, target = z.sigmoid().flatten(1), arrays["gt"].flatten(1)
    dice = 1 - (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, arrays["gt"])
    grads = torch.autograd.grad(bce + dice.mean(), (scores, masks, aggregation.slope))
    torch.testing.assert_close(grads[0], arrays["grad_score_logit"])
    torch.testing.assert_close(grads[1], arrays["grad_mask_logit"])
    torch.testing.assert_close(grads[2].reshape(-1), arrays["grad_slope"])
    selected = AdaptiveInstanceAggregation(form="select")(masks, scores.sigmoid())
    assert torch.equal(selected > 0, arrays["fixed_selection"])


def prediction(dtype=torch.float64):
    return InstancePrediction(
        score_logits=torch.randn(2, 6, dtype=dtype, requires_grad=True),
        mask_embeddings=torch.randn(2, 6, 8, dtype=dtype, requires_grad=True),
        pixels=torch.randn(2, 8, 5, 7, dtype=dtype, requires_grad=True),
        queries=torch.randn(2, 6, 8, dtype=dtype),
        tokens=torch.randn(2, 3, 8, dtype=dtype),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_queries": 6},
        {"prelu": False},
        {"bias": True},
        {"form": "noisy_or"},
        {"form": "select"},
        {"form": "noisy_or", "bias": True},
    ],
)
def test_factored_equals_built_masks(options):
    aggregation = AdaptiveInstanceAggregation(**options).double()
    if aggregation.bias is not None:
        torch.nn.init.constant_(aggregation.bias, 0.7)
    step = prediction()
    leaves = (step.mask_embeddings, step.pixels, *aggregation.parameters())
    out = aggregation(step)
    scores = step.score_logits.sigmoid()
    reference = aggregation(torch.einsum("bnc,bchw->bnhw", step.mask_embeddings, step.pixels), scores)
    torch.testing.assert_close(out, reference)
    weight = torch.randn_like(reference)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad((reference * weight).sum(), leaves))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"slope": ()}),
        ({"num_queries": 6}, {"slope": (6,)}),
        ({"prelu": False}, {}),
        ({"form": "select"}, {}),
        ({"form": "noisy_or", "bias": True}, {"bias": ()}),
        ({"form": "noisy_or", "num_queries": 6}, {}),
    ],
)
def test_builds_only_what_it_uses(options, names):
    aggregation = AdaptiveInstanceAggregation(**options)
    assert {name: tuple(p.shape) for name, p in aggregation.named_parameters()} == names
    step = prediction(torch.float32)
    aggregation(step).sum().backward()
    assert all(p.grad is not None for p in aggregation.parameters())


def test_order_of_instances_does_not_matter():
    aggregation = AdaptiveInstanceAggregation().double()
    masks, scores, order = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(aggregation(masks[:, order], scores[:, order]), aggregation(masks, scores))


@pytest.mark.parametrize("form", ["prelu", "noisy_or", "select"])
def test_compile_export_and_autocast(form):
    aggregation = AdaptiveInstanceAggregation(form=form)
    masks, scores = torch.randn(2, 6, 3, 4), torch.rand(2, 6)
    out = aggregation(masks, scores)
    torch.testing.assert_close(torch.compile(aggregation, fullgraph=True, backend="aot_eager")(masks, scores), out)
    torch.testing.assert_close(torch.export.export(aggregation, (masks, scores)).module()(masks, scores), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aggregation(masks, scores), out)


def test_errors():
    with pytest.raises(ValueError, match="`form` must be one of 'prelu'"):
        AdaptiveInstanceAggregation(form="mean")
    with pytest.raises(TypeError, match="`scores` must be given"):
        AdaptiveInstanceAggregation()(torch.zeros(1, 2, 3, 3))
