"""The kernels of ``cross_attend_both``, interpreted, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import cross_attend_both
from gresbox.testing import assert_matches_reference

pytestmark = pytest.mark.usefixtures("launched")


def parallel(form, valid):
    return lambda *inputs: cross_attend_both(*inputs, valid, backend=form)


def shared(form, valid):
    """One affinity: four inputs."""
    return lambda q, k, v_t, v_o: cross_attend_both(q, k, v_t, k, q, v_o, valid, backend=form)


def case(batch, heads, count, length, dim):
    """As projections leave them: ``(B, rows, heads, D)`` in memory."""
    rows = (count, length, length, length, count, count)
    return [torch.randn(batch, size, heads, dim).transpose(1, 2) for size in rows]


@pytest.mark.parametrize("sizes", [(2, 2, 1, 1, 1), (1, 2, 37, 5, 20), (2, 1, 100, 20, 32), (1, 1, 3, 40, 16), (1, 1, 70, 9, 64)])
def test_odd_sizes(launched, sizes):
    inputs, valid = case(*sizes), torch.rand(sizes[0], sizes[3]) > 0.3
    for real in (None, valid):
        assert_matches_reference(parallel("triton", real), parallel("eager", real), inputs)
        four = [inputs[index] for index in (0, 1, 2, 5)]
        assert_matches_reference(shared("triton", real), shared("eager", real), four)
    assert launched == ["_attend_kernel", "_unattend_kernel"] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(dtype):
    valid = torch.arange(20) < torch.tensor([[20], [7]])
    assert_matches_reference(parallel("triton", valid), parallel("eager", valid), case(2, 2, 37, 20, 32), dtype=dtype)
    mixed = [x if index else x.to(dtype) for index, x in enumerate(case(1, 1, 3, 4, 5))]
    assert all(out.dtype == dtype for out in cross_attend_both(*mixed, backend="triton"))


def test_any_strides():
    inputs = case(2, 2, 9, 6, 8)
    want = cross_attend_both(*inputs, backend="triton")
    turned = [x.mT.contiguous().mT if index % 2 else torch.cat([x, x], -1)[..., :8] for index, x in enumerate(inputs)]
    got = cross_attend_both(*turned, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    leaves = [x.detach().requires_grad_() for x in turned]
    grads = torch.autograd.grad(sum(out.square().sum() for out in cross_attend_both(*leaves, backend="triton")), leaves)
    plain = [x.detach().contiguous().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(sum(out.square().sum() for out in cross_attend_both(*plain, backend="triton")), plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_padding():
    """What padded tokens hold does not reach the objects; a text of padding only is read as its first token."""
    inputs, valid = case(2, 2, 5, 4, 8), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    for index in (1, 2):
        inputs[index] = inputs[index].clone()
        inputs[index][0, :, 1::2] = torch.nan
    leaves = [x.requires_grad_() for x in inputs]
    objects, words = cross_attend_both(*leaves, valid, backend="triton")
    assert objects.isfinite().all() and words.isfinite().all()
    torch.testing.assert_close(objects[1], leaves[2][1, :, :1].expand(-1, 5, -1))
    grads = torch.autograd.grad(objects.sum() + words.sum(), leaves)
    assert (grads[2][0, :, 1::2] == 0).all() and (grads[2][1, :, 1:] == 0).all()


def test_nothing_to_attend_to():
    for count, length in ((0, 3), (3, 0)):
        leaves = [x.requires_grad_() for x in case(1, 2, count, length, 4)]
        objects, words = cross_attend_both(*leaves, backend="triton")
        assert objects.shape == (1, 2, count, 4) and words.shape == (1, 2, length, 4)
        assert (objects == 0).all() and (words == 0).all()
        grads = torch.autograd.grad(objects.sum() + words.sum(), leaves)
        assert all((grad == 0).all() for grad in grads)


def test_large_logits_stay_finite():
    """The largest logit is in the first block of objects, or the last."""
    for place in (0, 70):
        inputs = case(1, 1, 71, 5, 4)
        inputs[4][:, :, place] = 1e4
        assert_matches_reference(parallel("triton", None), parallel("eager", None), inputs, tolerance=1e-4)


def test_what_the_kernel_cannot_do_is_said(launched):
    def call(count, length, dim, backend):
        return cross_attend_both(*case(1, 1, count, length, dim), backend=backend)

    for length, dim in ((65, 4), (17, 33)):
        said = f"its kernel takes up to 64 tokens and 1024 values of a head's tokens in float32, here are {length} of {dim}."
        with pytest.raises(RuntimeError, match=said):
            call(3, length, dim, "triton")
        assert call(3, length, dim, "auto")[0].shape == (1, 1, 3, dim)
    assert launched == []
