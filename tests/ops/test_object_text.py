"""Attention between objects and words against golden layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.ops import cross_attend_both


def test_golden_parallel(golden):
    data = {key: torch.from_numpy(x) for key, x in golden("instalign_objtext").items()}
    heads = int(data["heads"])

    def project(x, side, name):
        return (
            F.linear(x, data[f"parallel/{side}/w{name}"], data[f"parallel/{side}/b{name}"])
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
        )

    def close(x, side, name):
        return F.linear(x.transpose(1, 2).flatten(2), data[f"parallel/{side}/w{name}"], data[f"parallel/{side}/b{name}"])

    queries, tokens = data["q"], data["t"]
    placed = queries + data["query_pos"]
    objects, words = cross_attend_both(
        project(placed, "q2t", "q"),
        project(tokens, "q2t", "k"),
        project(tokens, "q2t", "v"),
        project(tokens, "t2q", "q"),
        project(placed, "t2q", "k"),
        project(queries, "t2q", "v"),
        data["mask"],
    )
    width = (queries.shape[-1],)
    queries = F.layer_norm(queries + close(objects, "q2t", "o"), width, *data["parallel/ln_q"])
    tokens = F.layer_norm(tokens + close(words, "t2q", "o"), width, *data["parallel/ln_t"])
    torch.testing.assert_close(queries, data["parallel/q"], rtol=0, atol=1e-13)
    torch.testing.assert_close(tokens, data["parallel/t"], rtol=0, atol=1e-13)


def test_golden_shared_affinity(golden):
    data = {key: torch.from_numpy(x) for key, x in golden("instalign_objtext").items()}
    heads = int(data["heads"])

    def project(x, name):
        return F.linear(x, data[f"shared/w{name}"], data[f"shared/b{name}"]).unflatten(-1, (heads, -1)).transpose(1, 2)

    queries, tokens = project(data["q"], "a"), project(data["t"], "k")
    object_value, token_value = project(data["q"], "vq"), project(data["t"], "vt")
    deltas = cross_attend_both(queries, tokens, token_value, tokens, queries, object_value, data["mask"])
    for delta, name, side in zip(deltas, ("oq", "ot"), ("q", "t"), strict=True):
        out = F.linear(delta.transpose(1, 2).flatten(2), data[f"shared/w{name}"], data[f"shared/b{name}"])
        torch.testing.assert_close(out, data[f"shared/delta_{side}"], rtol=0, atol=1e-13)


@given(st.integers(0, 2), st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))
def test_padding_order_and_batch_do_not_matter(batch, queries, length, padding):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    query, *words = (torch.randn(batch, 2, n, 3, dtype=torch.float64) for n in (queries, length, length, length))
    objects, tokens = cross_attend_both(query, words[0], words[1], words[2], query, query)
    assert objects.shape == query.shape
    assert tokens.shape == words[0].shape
    longer = [torch.cat([x, torch.randn(batch, 2, padding, 3, dtype=torch.float64)], dim=2) for x in words]
    valid = torch.arange(length + padding).expand(batch, -1) < length
    padded = cross_attend_both(query, longer[0], longer[1], longer[2], query, query, valid)
    torch.testing.assert_close(padded[0], objects)
    torch.testing.assert_close(padded[1][:, :, :length], tokens)
    order = torch.randperm(queries)
    turned = query[:, :, order]
    shuffled = cross_attend_both(turned, words[0], words[1], words[2], turned, turned)
    torch.testing.assert_close(shuffled[0], objects[:, :, order])
    torch.testing.assert_close(shuffled[1], tokens)


def test_a_text_of_only_padding_is_its_first_token():
    query, words = torch.randn(2, 2, 3, 4, requires_grad=True), torch.randn(2, 2, 5, 4, requires_grad=True)
    valid = torch.tensor([[0] * 5, [1] * 5])
    objects, tokens = cross_attend_both(query, words, words, words, query, query, valid)
    torch.testing.assert_close(objects[0], words[0, :, :1].expand(-1, 3, -1))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(objects.sum() + tokens.sum(), (query, words)))


def test_without_words_or_objects_the_result_is_zero():
    query, none = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    objects, tokens = cross_attend_both(query, none, none, none, query, query, torch.ones(1, 0, dtype=torch.bool))
    assert (objects == 0).all()
    assert tokens.shape == none.shape
    objects, tokens = cross_attend_both(none, query, query, query, none, none)
    assert objects.shape == none.shape
    assert (tokens == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
@pytest.mark.parametrize("real", [None, torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()], ids=["all real", "padded"])
def test_the_registered_op_passes_pytorchs_own_checks(real):
    rows = (4, 3, 3, 3, 4, 4)
    inputs = [torch.randn(2, count, 2, 5, dtype=torch.float64).transpose(1, 2).requires_grad_() for count in rows]
    op = torch.ops.gresbox.cross_attend_both.default
    torch.library.opcheck(op, (*inputs, real, False))
    outs = [out.detach() for out in op(*inputs, real, False)]
    kept = [*(leaf.detach() for leaf in inputs), real, False]
    torch.library.opcheck(torch.ops.gresbox.cross_attend_both_backward.default, (*outs, *kept, [True] * 5 + [False]))
    assert torch.autograd.gradcheck(lambda *x: op(*x, real, False), inputs)
    torch.testing.assert_close(op(*inputs, real, False), cross_attend_both(*inputs, real, backend="eager"))
