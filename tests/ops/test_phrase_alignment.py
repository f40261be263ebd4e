"""Phrase-object alignment against the paper's equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import align_phrases

CASES = ["full", "padded", "single_token", "first_token_excluded", "no_token_in_sample1", "large", "identical_tokens"]
FORMS = pytest.mark.parametrize("backend", ["eager", "auto"])


@FORMS
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case, detach, backend):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("instalign_poa").items() if key.startswith(f"{case}/")}
    queries, tokens = data["q"].requires_grad_(), data["t"].requires_grad_()
    loss, relevance = align_phrases(queries, tokens, data["mask"], detach_relevance=detach, backend=backend)
    torch.testing.assert_close(loss, data["loss"], rtol=0, atol=1e-14)
    torch.testing.assert_close(relevance, data["R"], rtol=0, atol=1e-14)
    grads = torch.autograd.grad(loss, (queries, tokens), data["grad_loss"])
    assert all(grad.isfinite().all() for grad in grads)
    if "grad_q" in data:
        suffix = "_detachR" if detach else ""
        torch.testing.assert_close(grads[0], data[f"grad_q{suffix}"], rtol=0, atol=1e-14)
        torch.testing.assert_close(grads[1], data[f"grad_t{suffix}"], rtol=0, atol=1e-14)


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 6), st.integers(0, 5))
def test_padding_order_and_batch_do_not_matter(batch, queries, length, padding):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    generator = torch.Generator().manual_seed(batch + 10 * queries + 100 * length)
    query = torch.randn(batch, queries, 8, generator=generator, dtype=torch.float64)
    token = torch.randn(batch, length, 8, generator=generator, dtype=torch.float64)
    loss, relevance = align_phrases(query, token)
    assert loss.shape == (batch, queries)
    assert relevance.shape == (batch, queries, length)
    longer = torch.cat([token, torch.full((batch, padding, 8), torch.nan, dtype=torch.float64)], dim=1)
    valid = torch.arange(length + padding).expand(batch, -1) < length
    padded_loss, padded = align_phrases(query, longer, valid)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded[..., :length], relevance)
    assert (padded[..., length:] == 0).all()
    order = torch.randperm(queries, generator=generator)
    torch.testing.assert_close(align_phrases(query[:, order], token.flip(1))[0], loss[:, order])
    for index in range(batch):
        torch.testing.assert_close(align_phrases(query[index : index + 1], token[index : index + 1])[0][0], loss[index])


@pytest.mark.parametrize("form", ["eager", "auto", "op"])
def test_padding_may_be_anything_and_gets_no_gradient(form):
    query, token = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]) > 0
    padded = torch.where(valid[..., None], token, torch.tensor([torch.nan, torch.inf]).repeat(4)[None, None])

    def align(q, t):
        if form == "op":
            return torch.ops.gresbox.align_phrases(q, t, valid, False)
        return align_phrases(q, t, valid, backend=form)

    def gradients(f, *leaves):
        loss, relevance = f(*(leaf.requires_grad_() for leaf in leaves))
        return loss, relevance, *torch.autograd.grad(loss.sum() + (relevance * weight).sum(), leaves)

    weight = torch.randn(2, 3, 4)
    clean = gradients(lambda q, t: align_phrases(q, t, valid, backend="eager"), query.clone(), token * valid[..., None])
    for got, wanted in zip(gradients(align, query.clone(), padded), clean, strict=True):
        torch.testing.assert_close(got, wanted)
    assert (clean[3][~valid] == 0).all()


def test_a_backward_pass_under_autocast_is_not_lowered():
    query, token = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    wanted = torch.autograd.grad(align_phrases(query, token)[0].sum(), (query, token))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(align_phrases(query, token)[0].sum(), (query, token))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3)])
def test_the_relevance_may_be_written_over(sizes):
    query, token = torch.randn(2, sizes[0], 8, requires_grad=True), torch.randn(2, sizes[1], 8)
    wanted = torch.autograd.grad(align_phrases(query, token, detach_relevance=True)[0].sum(), query)
    loss, relevance = align_phrases(query, token, detach_relevance=True)
    relevance.zero_()
    assert torch.equal(torch.autograd.grad(loss.sum(), query)[0], wanted[0])


@FORMS
def test_hostile_values_stay_finite(backend):
    token = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # equally relevant opposite tokens: the phrase is zero
    queries = torch.tensor([[[0.0, 0.0], [0.0, 5.0], [1e4, 0.0], [1e-7, 0.0]]]).requires_grad_()
    tokens = token[None].clone().requires_grad_()
    loss, relevance = align_phrases(queries, tokens, backend=backend)
    assert ((loss >= 0) & (loss <= 2)).all()
    assert loss[0, 0] == 1
    torch.testing.assert_close(relevance.sum(-1), torch.ones(1, 4))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.sum(), (queries, tokens)))


@FORMS
def test_without_a_real_token_everything_is_zero(backend):
    queries, tokens = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    valid = torch.tensor([[0] * 5, [1] * 5])
    loss, relevance = align_phrases(queries, tokens, valid, backend=backend)
    assert (loss[0] == 0).all()
    assert (relevance[0] == 0).all()
    grads = torch.autograd.grad(loss.sum(), (queries, tokens))
    assert all((grad[0] == 0).all() and (grad[1] != 0).any() for grad in grads)


def test_detached_tokens_get_no_gradient():
    queries, tokens = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 5, 4, requires_grad=True)
    loss, _ = align_phrases(queries, tokens, detach_tokens=True)
    grads = torch.autograd.grad(loss.sum(), (queries, tokens), allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None


def test_errors():
    queries, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match=r"^align_phrases: `tokens` must be \(B, L, C\) with C=4, got \(2, 5, 3\)\.$"):
        align_phrases(queries, tokens[..., :3])
    with pytest.raises(ValueError, match=r"^align_phrases: `valid` must be \(B, L\) with B=2, L=5, got \(2, 4\)\.$"):
        align_phrases(queries, tokens, torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"`valid` must be bool or 0/1 integers, got torch\.float32"):
        align_phrases(queries, tokens, torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"`queries` must be a floating-point tensor, got torch\.int64"):
        align_phrases(queries.long(), tokens)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("real", [None, torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()], ids=["all real", "padded"])
def test_the_registered_op_passes_pytorchs_own_checks(real, detached):
    inputs = [torch.randn(2, count, 5, dtype=torch.float64).requires_grad_() for count in (4, 3)]
    op = torch.ops.gresbox.align_phrases.default
    torch.library.opcheck(op, (*inputs, real, detached))
    outs = [out.detach() for out in op(*inputs, real, detached)]
    kept = [*(leaf.detach() for leaf in inputs), real, detached]
    torch.library.opcheck(torch.ops.gresbox.align_phrases_backward.default, (*outs, *kept, [True, False]))
    if not detached:  # what is held fixed is no derivative
        assert torch.autograd.gradcheck(lambda *x: op(*x, real, False), inputs)
    definition = align_phrases(*inputs, real, detach_relevance=detached, backend="eager")
    torch.testing.assert_close(op(*inputs, real, detached), definition)
    grads = (torch.autograd.grad(loss.sum(), inputs) for loss in (op(*inputs, real, detached)[0], definition[0]))
    torch.testing.assert_close(*grads)
