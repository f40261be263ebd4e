"""The kernels of ``aggregate_queries``, interpreted, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from gresbox.kernels import aggregation as kernels
from gresbox.ops import aggregate_queries
from gresbox.ops._aggregation_chunks import KEEP_BITS, KEEP_BYTES, KEEP_NOTHING
from gresbox.testing import TOLERANCES, assert_matches_reference, relative_error


@pytest.fixture(autouse=True)
def few_programs(launched, monkeypatch):
    """Each of them owns several blocks."""
    monkeypatch.setattr(kernels, "_PROGRAMS", 6)


def kernel(queries, pixels, scores, slope, bias=None):
    return aggregate_queries(queries, pixels, scores, slope, bias=bias, backend="triton")


def definition(queries, pixels, scores, slope, bias=None):
    return aggregate_queries(queries, pixels, scores, slope, bias=bias, backend="eager")


def case(batch, count, dim, height, width, *, per_query=False):
    queries, pixels = torch.randn(batch, count, dim), torch.randn(batch, dim, height, width)
    return [queries, pixels, torch.rand(batch, count), torch.rand(count if per_query else ()) - 0.2]


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5, 6, 4, 5), (1, 1, 20, 1, 1), (2, 37, 70, 1, 97), (1, 100, 16, 10, 15), (1, 130, 9, 3, 11)])
def test_odd_sizes(launched, sizes, per_query):
    assert_matches_reference(kernel, definition, [*case(*sizes, per_query=per_query), torch.tensor(0.3)])
    assert launched == ["_merge_kernel", "_to_pixels_kernel", "_to_queries_kernel", "_close_kernel"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_query", [False, True])
def test_16_bit_inputs(dtype, per_query):
    assert_matches_reference(kernel, definition, case(2, 19, 24, 7, 13, per_query=per_query), dtype=dtype)
    assert kernel(*(x.to(dtype) for x in case(1, 3, 4, 2, 2))).dtype == dtype


@pytest.mark.parametrize("narrow", [0, 1])
def test_mixed_dtypes_are_multiplied_in_float32(narrow):
    leaves = case(1, 19, 24, 7, 13)
    leaves[narrow] = leaves[narrow].bfloat16()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    merged, want = kernel(*leaves), definition(*exact)
    weight = torch.randn(merged.shape).to(merged.dtype)
    assert relative_error(merged, want) <= TOLERANCES[merged.dtype]
    for leaf, got, ref in zip(
        leaves, torch.autograd.grad(merged, leaves, weight), torch.autograd.grad(want, exact, weight.double()), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert relative_error(got, ref) <= TOLERANCES[leaf.dtype]


def test_any_strides():
    queries, pixels, scores, slope = case(2, 17, 12, 6, 10, per_query=True)
    want = kernel(queries, pixels, scores, slope)
    turned = queries.mT.contiguous().mT, pixels.contiguous(memory_format=torch.channels_last), scores.T.contiguous().T
    assert torch.equal(kernel(*turned, torch.stack([slope, slope], -1)[:, 0]), want)
    sliced = torch.cat([queries, queries], 2)[..., :12], torch.cat([pixels, pixels], 3)[..., :10]
    assert torch.equal(kernel(*sliced, scores, slope), want)
    leaves = [leaf.requires_grad_() for leaf in (turned[0].detach(), sliced[1].detach(), scores, slope)]
    plain = [leaf.detach().contiguous().requires_grad_() for leaf in leaves]
    weight = torch.randn(want.shape)
    for got, ref in zip(
        torch.autograd.grad(kernel(*leaves), leaves, weight), torch.autograd.grad(kernel(*plain), plain, weight), strict=True
    ):
        assert torch.equal(got, ref)
    shared = pixels[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(kernel(queries, shared, scores, slope), definition(queries, shared, scores, slope))


def test_only_what_is_needed_runs(launched):
    queries, pixels, scores, slope = case(1, 5, 6, 4, 5)
    kernel(queries, pixels, scores, slope)
    assert launched == ["_merge_kernel"]
    kernel(queries, pixels.requires_grad_(), scores, slope).sum().backward()
    assert launched == ["_merge_kernel"] * 2 + ["_to_pixels_kernel"]
    launched.clear()
    kernel(queries.requires_grad_(), pixels.detach(), scores, slope).sum().backward()
    assert launched == ["_merge_kernel", "_to_queries_kernel", "_close_kernel"]
    with torch.no_grad():
        kernel(queries, pixels, scores, slope)
    assert launched[3:] == ["_merge_kernel"]


@pytest.mark.parametrize("keep", [KEEP_NOTHING, KEEP_BYTES, KEEP_BITS])
def test_however_the_sides_are_kept_gradients_are_equal(keep):
    leaves = [leaf.requires_grad_() for leaf in case(1, 5, 6, 4, 11, per_query=True)]
    merged, _ = torch.ops.gresbox.aggregate_queries(*leaves, "prelu", 0, keep)
    weight = torch.randn(merged.shape)
    want = torch.autograd.grad(definition(*leaves), leaves, weight)
    torch.testing.assert_close(torch.autograd.grad(merged, leaves, weight), want)


def test_a_mask_of_zero_is_on_the_negative_side():
    leaves = [torch.zeros(1, 3, 4), torch.randn(1, 4, 2, 3), torch.rand(1, 3), torch.tensor(0.25)]
    assert_matches_reference(kernel, definition, leaves)
    leaves = [torch.tensor([[[1.0, -1.0]]]), torch.ones(1, 2, 1, 40), torch.rand(1, 1), torch.tensor(0.25)]
    assert_matches_reference(kernel, definition, leaves)


def test_without_queries_or_pixels():
    queries, pixels, scores, slope = (leaf.requires_grad_() for leaf in case(2, 0, 4, 3, 2))
    merged = kernel(queries, pixels, scores, slope)
    assert merged.shape == (2, 3, 2) and (merged == 0).all()
    grads = torch.autograd.grad(merged.sum(), (queries, pixels, scores, slope))
    assert all((grad == 0).all() for grad in grads)
    assert kernel(*case(2, 3, 4, 0, 2)).shape == (2, 0, 2)
    assert (kernel(*case(2, 3, 0, 2, 2)) == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by NumPy, in the interpreter
def test_what_is_no_number_stays_at_its_pixel():
    queries, pixels, scores, slope = case(1, 5, 6, 6, 10)
    want = kernel(queries, pixels, scores, slope)
    pixels[0, :, 2, 3], pixels[0, 1, 4, 4] = torch.inf, torch.nan
    merged = kernel(queries, pixels, scores, slope)
    finite = torch.ones_like(merged, dtype=torch.bool)
    finite[0, 2, 3] = finite[0, 4, 4] = False
    assert torch.equal(merged[finite], want[finite])
    torch.testing.assert_close(merged, definition(queries, pixels, scores, slope), equal_nan=True)


def test_the_same_inputs_give_the_same_bits():
    leaves = [leaf.requires_grad_() for leaf in case(2, 20, 12, 9, 20)]
    weight = torch.randn(2, 9, 20)
    first, second = (torch.autograd.grad(kernel(*leaves), leaves, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernel_cannot_do_is_said():
    queries, pixels, scores, slope = case(1, 2, 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"not possible here: its kernel merges with form='prelu' and a slope\.$"):
        aggregate_queries(queries, pixels, scores, None, form="noisy_or", backend="triton")
    with pytest.raises(RuntimeError, match=r"not possible here: some input is float64"):
        aggregate_queries(queries.double(), pixels, scores, slope, backend="triton")
    wide = torch.zeros(1, 1, 4097), torch.zeros(1, 4097, 1, 1)
    with pytest.raises(RuntimeError, match=r"not possible here: its kernel takes up to 4096 channels, here are 4097\.$"):
        aggregate_queries(*wide, scores[:, :1], slope, backend="triton")
    assert aggregate_queries(*wide, scores[:, :1], slope).shape == (1, 1, 1)
    many = torch.zeros(1, 1, 1).expand(65536, -1, -1), torch.zeros(1, 1, 1, 1).expand(65536, -1, -1, -1)
    with pytest.raises(RuntimeError, match=r"not possible here: its kernel takes up to 65535 images, here are 65536\.$"):
        aggregate_queries(*many, torch.zeros(65536, 1), slope, backend="triton")
