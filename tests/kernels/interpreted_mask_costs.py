"""The kernels of ``query_mask_cost``, interpreted, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from gresbox.kernels import mask_costs as kernels
from gresbox.ops import query_mask_cost
from gresbox.ops._backend import why_not_triton
from gresbox.testing import TOLERANCES, relative_error


@pytest.fixture(autouse=True)
def small_blocks(launched, monkeypatch):
    """Small inputs have several of them."""
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    for table in (kernels.NARROW, kernels.IEEE):
        monkeypatch.setitem(table, "sm_80", kernels.Settings(16, 32, 32, 4, 2))


def case(batch, queries, channels, height, width, most, *, dtype=torch.float32, scale=1.0):
    query = (torch.randn(batch, queries, channels) * scale).to(dtype)
    pixels = torch.randn(batch, channels, height, width).to(dtype)
    return query, pixels, torch.rand(batch, most, height, width)


def check(queries, pixels, targets, *, tolerance=None):
    assert why_not_triton(queries, pixels, targets) is None
    got = query_mask_cost(queries, pixels, targets, backend="triton", dtype=torch.float32)
    want = query_mask_cost(queries.double(), pixels.double(), targets.double(), backend="eager")
    limit = tolerance or TOLERANCES[pixels.dtype]
    for out, ref in zip(got, want, strict=True):
        assert relative_error(out, ref) <= limit
    return got


@pytest.mark.parametrize(("queries", "pixels", "most"), [(1, (1, 1), 1), (37, (1, 97), 3), (17, (10, 15), 17), (16, (4, 8), 16)])
def test_odd_sizes(queries, pixels, most):
    check(*case(2, queries, 20, *pixels, most))


@pytest.mark.parametrize("channels", [1, 32, 70])
def test_any_number_of_channels(channels):
    check(*case(1, 5, channels, 5, 9, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(dtype):
    bce, dice = check(*case(2, 19, 24, 7, 13, 4, dtype=dtype))
    assert bce.dtype == dice.dtype == torch.float32
    queries, pixels, targets = case(1, 5, 24, 7, 13, 4, dtype=dtype)
    assert query_mask_cost(queries, pixels, targets, backend="triton")[0].dtype == dtype
    check(queries.float(), pixels, targets.to(dtype), tolerance=1e-5)  # of mixed dtypes the wider one counts


def test_strides_and_boolean_targets():
    queries, pixels, targets = case(2, 18, 20, 6, 11, 3)
    want = query_mask_cost(queries, pixels, targets, backend="triton")
    turned = query_mask_cost(
        queries.mT.contiguous().mT,
        pixels.contiguous(memory_format=torch.channels_last),
        torch.stack([targets, targets], -1)[..., 0],
        backend="triton",
    )
    assert all(torch.equal(x, y) for x, y in zip(want, turned, strict=True))
    check(queries[:1].expand(2, -1, -1), pixels[..., ::2], targets[..., ::2])
    truth = targets > 0.5
    flags = query_mask_cost(queries, pixels, truth, backend="triton")
    numbers = query_mask_cost(queries, pixels, truth.float(), backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(flags, numbers, strict=True))


def test_extreme_logits_and_empty_masks():
    queries, pixels, _ = case(1, 18, 4, 5, 8, 2, scale=60.0)
    bce, dice = check(queries, pixels, torch.zeros(1, 2, 5, 8))
    assert bce.isfinite().all() and dice.isfinite().all()
    check(queries, pixels, torch.ones(1, 2, 5, 8))


def test_not_a_number_stays_in_its_row():
    queries, pixels, targets = case(1, 18, 4, 5, 8, 2)
    queries[0, 3] = torch.nan
    bce, dice = query_mask_cost(queries, pixels, targets, backend="triton")
    rows = torch.arange(18) == 3
    for cost in (bce, dice):
        assert cost[0, rows].isnan().all() and cost[0, ~rows].isfinite().all()


def test_the_same_bits_on_every_run_and_gradients_through_the_chunks():
    inputs = case(2, 37, 20, 9, 12, 3)
    first = query_mask_cost(*inputs, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(first, query_mask_cost(*inputs, backend="triton"), strict=True))
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_()]
    got = torch.autograd.grad(sum(x.square().sum() for x in query_mask_cost(*inputs, backend="triton")), leaves)
    want = torch.autograd.grad(sum(x.square().sum() for x in query_mask_cost(*inputs, backend="eager")), leaves)
    assert all(relative_error(x, y) <= 2e-5 for x, y in zip(got, want, strict=True))


def test_what_the_kernel_does_not_take_goes_chunk_by_chunk_and_says_why():
    queries, pixels, targets = case(1, 3, 4, 2, 2, 65)
    bce, _ = query_mask_cost(queries, pixels, targets)
    assert torch.allclose(bce, query_mask_cost(queries, pixels, targets, backend="eager")[0], atol=1e-6)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not possible here: there are more than 64 targets\.$"):
        query_mask_cost(queries, pixels, targets, backend="triton")
    apart = torch.empty((1, 4, 2, 2), device="meta").as_strided((1, 4, 2, 2), (1, 2**30, 2, 1))
    for far in ((apart, targets[:, :2]), (pixels, apart[:, :3])):
        with pytest.raises(RuntimeError, match=r"one image reaches over more than 2\*\*31 values\.$"):
            query_mask_cost(queries, *far, backend="triton")
    with pytest.raises(RuntimeError, match=r"some axis has no element\.$"):
        query_mask_cost(queries[:, :0], pixels, targets[:, :2], backend="triton")
    for empty in (
        (queries[:, :0], pixels, targets),
        (queries, pixels, targets[:, :0]),
        (queries, pixels[..., :0], targets[..., :0]),
    ):
        assert query_mask_cost(*empty)[0].shape == (1, empty[0].shape[1], empty[2].shape[1])
    with pytest.raises(RuntimeError, match=r"some input is float64 and kernels compute in float32\.$"):
        query_mask_cost(queries.double(), pixels, targets[:, :2], backend="triton")
