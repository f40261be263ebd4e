"""The kernels of matched_mask_losses, interpreted, against every mask built in float64: losses and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from gresbox.kernels import mask_losses
from gresbox.ops import matched_mask_losses
from gresbox.testing import assert_matches_reference

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernels write starts as NaN, so that a place that is not written is seen. Returns the launches."""
    run, launches = mask_losses.Launch.run, []

    def poison_and_run(launch):
        for name in ("partial", "bce", "dice", "grad_masks"):
            if name in launch.arguments and not (name == "partial" and "bce" in launch.arguments):
                launch.arguments[name].fill_(math.nan)
        launches.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(mask_losses.Launch, "run", poison_and_run)
    return launches


def scene(steps=2, batch=2, queries=5, channels=6, most=3, size=(5, 9)):
    """Several targets in the first image, fewer in the others, and one step that has no query for one of them."""
    embeddings, pixels = torch.randn(steps, batch, queries, channels), torch.randn(batch, channels, *size)
    matches = torch.stack([torch.randperm(max(queries, most))[:most] for _ in range(steps * batch)]).view(steps, batch, most)
    matches[matches >= queries] = -1
    matches[:, 1:, most // 2 :] = -1
    if most > 2:
        matches[0, 0, 1] = -1
    return embeddings, pixels, torch.rand(batch, most, *size), matches


def check(queries, pixels, targets, matches, dtype=torch.float32, **options):
    assert_matches_reference(
        lambda q, v: matched_mask_losses(q, v, targets, matches, backend="triton"),
        lambda q, v: matched_mask_losses(q, v, targets, matches, backend="eager"),
        [queries, pixels],
        dtype=dtype,
        **options,
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"steps": 1, "batch": 1, "queries": 1, "channels": 1, "most": 1, "size": (1, 1)},
        {"steps": 1, "queries": 1, "most": 3, "size": (97, 1)},
        {"steps": 3, "channels": 40, "most": 5, "size": (10, 15)},
        {"steps": 10, "most": 7, "queries": 9, "channels": 17, "size": (9, 8)},  # several blocks of rows, the last one cut
        {"batch": 1, "channels": 300, "size": (3, 50)},  # several blocks of channels
    ],
    ids=str,
)
def test_losses_and_gradients(poisoned, sizes):
    check(*scene(**sizes))
    assert poisoned == ["_sums_kernel", "_close_kernel", "_gradient_kernel"]


@pytest.mark.parametrize("dtype", HALVES)
def test_low_precision(dtype):
    queries, pixels, targets, matches = scene(channels=20, size=(7, 11))
    check(queries, pixels, targets > 0.5, matches, dtype)
    exact = matched_mask_losses(queries.to(dtype).double(), pixels.to(dtype).double(), targets, matches)
    found = matched_mask_losses(queries.to(dtype), pixels.to(dtype), targets, matches, dtype=torch.float32)
    for loss, want in zip(found, exact, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)  # logits are not rounded


@pytest.mark.parametrize("weight", [0.0, 2.0**-12, 1.0, 2.0**12])
def test_float16_keeps_the_digits_of_small_gradients(float16_error, weight):
    """As a mean over many pixels and instances has them, and times a scaler's factor; the same digits at every size."""
    # Below a weight of 1 the result's own dtype rounds.
    assert float16_error(*scene(channels=20, size=(40, 50)), weight) <= (2e-3 if weight >= 1 else 2e-2)


@pytest.mark.parametrize("largest", [0.0, 1e-9, 1e-3, 1.0, 1e6, 1e30, math.inf])
def test_the_scale_is_a_number_of_float16(largest):
    """CUDA rounds the divisor to the dtype of what it divides; the CPU, where these tests run, does not."""
    scale = mask_losses._scale_of(torch.tensor([0.0, -largest]), torch.zeros(2), 2000)
    assert scale.half().double() == scale.double()
    assert math.frexp(scale.item())[0] == 0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_mixed_dtypes(dtype):
    queries, pixels, targets, matches = scene()
    pixels = pixels.to(dtype).requires_grad_()
    queries.requires_grad_()
    exact = queries.detach().double().requires_grad_(), pixels.detach().double().requires_grad_()
    losses = matched_mask_losses(queries, pixels, targets.to(dtype), matches)
    wanted = matched_mask_losses(*exact, targets.to(dtype), matches)
    weights = torch.randn(2, *matches.shape)
    grads = torch.autograd.grad((torch.stack(losses) * weights).sum(), (queries, pixels))
    wanted_grads = torch.autograd.grad((torch.stack(wanted) * weights).sum(), exact)
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], wanted_grads[0].float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1], wanted_grads[1].to(dtype), rtol=2e-2, atol=1e-5)


def test_any_strides():
    queries, pixels, targets, matches = scene(queries=8, channels=10, size=(6, 8))
    channels_last = pixels.to(memory_format=torch.channels_last)
    check(queries, channels_last, targets, matches)
    check(queries[:, :, :, ::2], pixels[:, ::2], targets, matches)
    check(queries, pixels.expand(2, -1, -1, -1), targets[:1].expand(2, -1, -1, -1), matches)
    flat = torch.randn(2, 10, 1, 1).expand(-1, -1, 6, 8)
    check(queries, flat, targets.mT.contiguous().mT, matches.mT.contiguous().mT)


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_large_logits(scale):
    queries, pixels, targets, matches = scene()
    check(queries * scale, pixels, targets > 0.5, matches)
    sure = torch.full((1, 1, 1, 1), scale)
    sign = torch.tensor([1.0, -1.0, -1.0]).view(1, 1, 1, 3)
    bce, dice = matched_mask_losses(sure, sign, sign[:, 0:1] > 0, torch.zeros(1, 1, 1, dtype=torch.int64), backend="triton")
    assert bce.item() == pytest.approx(math.log1p(math.exp(-scale)), rel=1e-5)
    assert abs(dice.item()) < 1e-6


def test_without_a_match_there_is_no_loss_and_no_gradient():
    queries, pixels, targets, matches = scene(most=4)
    matches[matches == 0] = 1
    queries[:, :, 0] = math.nan
    queries.requires_grad_(), pixels.requires_grad_()
    bce, dice = matched_mask_losses(queries, pixels, targets, matches, backend="triton")
    assert (bce[matches < 0] == 0).all() and (dice[matches < 0] == 0).all() and (bce[matches >= 0] > 0).all()
    for grad in torch.autograd.grad(bce.sum() + dice.sum(), (queries, pixels)):
        assert grad.isfinite().all()
    check(queries.detach().nan_to_num(), pixels.detach(), targets, torch.full_like(matches, -1), grad=False)


def test_no_number_stays_where_it_is():
    """One embedding that is NaN makes its own losses NaN; the others are what they were."""
    queries, pixels, targets, matches = scene(queries=3, most=3)
    clean = matched_mask_losses(queries, pixels, targets, matches)
    broken = queries.clone()
    broken[0, 0, matches[0, 0, 0]] = math.nan
    found = matched_mask_losses(broken, pixels, targets, matches)
    for loss, want in zip(found, clean, strict=True):
        assert loss[0, 0, 0].isnan()
        loss[0, 0, 0] = want[0, 0, 0]
        assert torch.equal(loss, want)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs):
    queries, pixels, targets, matches = scene()
    queries.requires_grad_(needs[0]), pixels.requires_grad_(needs[1])
    leaf = queries if needs[0] else pixels
    got, want = (
        torch.autograd.grad(torch.stack(matched_mask_losses(queries, pixels, targets, matches, backend=backend)).sum(), leaf)[0]
        for backend in ("triton", "eager")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    queries, pixels, targets, matches = scene(steps=4, channels=33, size=(11, 13))
    queries.requires_grad_(), pixels.requires_grad_()

    def run():
        losses = matched_mask_losses(queries, pixels, targets, matches, backend="triton")
        return *losses, *torch.autograd.grad(torch.stack(losses).sum(), (queries, pixels))

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_sizes_without_elements_take_the_definition(poisoned):
    for change in ({"steps": 0}, {"batch": 0}, {"most": 0}, {"size": (0, 4)}):
        sizes = {"steps": 2, "batch": 2, "queries": 3, "channels": 4, "most": 2, "size": (3, 4)} | change
        queries = torch.randn(sizes["steps"], sizes["batch"], sizes["queries"], 4)
        matches = torch.zeros(sizes["steps"], sizes["batch"], sizes["most"], dtype=torch.int64)
        inputs = (
            queries,
            torch.randn(sizes["batch"], 4, *sizes["size"]),
            torch.rand(sizes["batch"], sizes["most"], *sizes["size"]),
        )
        bce, dice = matched_mask_losses(*inputs, matches)
        assert bce.shape == dice.shape == matches.shape
        with pytest.raises(RuntimeError, match="some axis has no element"):
            matched_mask_losses(*inputs, matches, backend="triton")
    assert not poisoned


def test_auto_is_the_kernel_and_needs_no_kept_masks(poisoned):
    queries, pixels, targets, matches = scene()
    matched_mask_losses(queries.requires_grad_(), pixels, targets, matches)
    assert poisoned == ["_sums_kernel", "_close_kernel"]
    matched_mask_losses(queries.double(), pixels.double(), targets, matches)
    assert len(poisoned) == 2
