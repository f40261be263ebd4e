"""The kernels of ``align_phrases``, interpreted, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import align_phrases
from gresbox.testing import assert_matches_reference

pytestmark = pytest.mark.usefixtures("launched")


def both(valid=None, **options):
    """The kernel and the definition as functions of queries and tokens."""
    return tuple(lambda q, t, form=form: align_phrases(q, t, valid, backend=form, **options) for form in ("triton", "eager"))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize(
    ("batch", "count", "length", "dim"), [(2, 1, 1, 2), (1, 37, 5, 70), (2, 40, 20, 33), (1, 5, 33, 64), (1, 2, 128, 9)]
)
def test_odd_sizes(launched, batch, count, length, dim, detached):
    valid = torch.rand(batch, length) > 0.3
    for real in (None, valid):
        forms = both(real, detach_relevance=detached)
        assert_matches_reference(*forms, [torch.randn(batch, count, dim), torch.randn(batch, length, dim)])
    assert launched == ["_align_kernel", "_to_logits_kernel", "_to_inputs_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(dtype):
    valid = torch.arange(20) < torch.tensor([[20], [7]])
    assert_matches_reference(*both(valid), [torch.randn(2, 37, 48), torch.randn(2, 20, 48)], dtype=dtype)
    loss, relevance = align_phrases(torch.randn(1, 2, 4).to(dtype), torch.randn(1, 3, 4), backend="triton")
    assert loss.dtype == relevance.dtype == dtype


def test_any_strides_and_integer_flags():
    queries, tokens, valid = torch.randn(2, 6, 24), torch.randn(2, 7, 24), torch.tensor([[1] * 7, [1, 1, 0, 0, 1, 0, 1]])
    want = align_phrases(queries, tokens, valid, backend="triton")
    turned = queries.mT.contiguous().mT, torch.stack([tokens, tokens], -1)[..., 0]
    got = align_phrases(*turned, valid.T.contiguous().T, backend="triton")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    once = valid[1:].expand(2, -1)
    torch.testing.assert_close(
        align_phrases(*turned, once, backend="triton"), align_phrases(queries, tokens, once, backend="eager"), rtol=1e-5, atol=1e-6
    )


def test_padding_may_hold_anything_and_gets_no_gradient():
    queries, tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    valid = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    hostile = torch.where(valid[..., None] == 1, tokens, torch.nan).requires_grad_()
    leaf = queries.clone().requires_grad_()
    loss, relevance = align_phrases(leaf, hostile, valid, backend="triton")
    torch.testing.assert_close((loss, relevance), align_phrases(queries, tokens, valid, backend="eager"))
    assert (loss[1] == 0).all() and (relevance[1] == 0).all() and (relevance[0, :, 2:4] == 0).all()
    to_queries, to_tokens = torch.autograd.grad(loss.sum() + (relevance * torch.randn(2, 3, 5)).sum(), (leaf, hostile))
    assert to_queries.isfinite().all() and to_tokens.isfinite().all()
    assert (to_queries[1] == 0).all() and (to_tokens[valid == 0] == 0).all() and (to_tokens[valid == 1] != 0).all()


def test_hostile_values_stay_finite():
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]).requires_grad_()  # equally relevant opposite tokens: the phrase is zero
    queries = torch.tensor([[[0.0, 0.0], [0.0, 5.0], [1e4, 0.0], [1e-7, 0.0]]]).requires_grad_()
    loss, relevance = align_phrases(queries, tokens, backend="triton")
    assert ((loss >= 0) & (loss <= 2)).all() and loss[0, 0] == 1
    torch.testing.assert_close(relevance.sum(-1), torch.ones(1, 4))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), (queries, tokens)))
    loss, _ = align_phrases(torch.full((1, 1, 2), torch.nan), tokens, backend="triton")
    assert loss.isnan().all()


def test_nothing_to_align():
    queries, tokens = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 0, 4, requires_grad=True)
    loss, relevance = align_phrases(queries, tokens, backend="triton")
    assert (loss == 0).all() and relevance.shape == (2, 3, 0)
    assert (torch.autograd.grad(loss.sum(), queries)[0] == 0).all()
    loss, relevance = align_phrases(tokens, queries, backend="triton")
    assert loss.shape == (2, 0) and relevance.shape == (2, 0, 3)
    assert (torch.autograd.grad(loss.sum(), queries)[0] == 0).all()


def test_the_same_inputs_give_the_same_bits():
    leaves = [torch.randn(2, 70, 12, requires_grad=True), torch.randn(2, 9, 12, requires_grad=True)]
    first, second = (torch.autograd.grad(align_phrases(*leaves, backend="triton")[0].sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_kernel_cannot_do_is_said():
    with pytest.raises(RuntimeError, match=r"not possible here: its kernel takes up to 128 tokens, here are 129\.$"):
        align_phrases(torch.zeros(1, 2, 4), torch.zeros(1, 129, 4), backend="triton")
    assert align_phrases(torch.zeros(1, 2, 4), torch.zeros(1, 129, 4))[0].shape == (1, 2)
