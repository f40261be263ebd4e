from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.blocks import NoTargetHead

FORMS = ("both", "global", "sentence", "mean")


def test_golden(golden):
    arrays = {key: torch.from_numpy(value) for key, value in golden("instalign_nt").items()}
    head = NoTargetHead(8).double()
    head.mlp.load_state_dict(
        {
            "layers.0.weight": arrays["w1"],
            "layers.0.bias": arrays["b1"],
            "layers.1.weight": arrays["w2"],
            "layers.1.bias": arrays["b2"],
        }
    )
    logit = head(arrays["q"], arrays["score_logit"].sigmoid(), arrays["t"], arrays["mask"])
    torch.testing.assert_close(logit, arrays["nt_logit"], atol=1e-10, rtol=1e-10)


def case(batch=3, queries=5, length=4, dim=8):
    shape = {"dtype": torch.float64, "requires_grad": True}
    return torch.randn(batch, queries, dim, **shape), torch.rand(batch, queries, **shape), torch.randn(batch, length, dim, **shape)


@pytest.mark.parametrize("inputs", FORMS)
def test_reads_exactly_what_it_says(inputs):
    head = NoTargetHead(8, inputs=inputs).double()
    grads = torch.autograd.grad(head(*(arguments := case())).sum(), arguments, allow_unused=True)
    reads = {
        "both": (True, True, True),
        "global": (True, True, False),
        "sentence": (False, False, True),
        "mean": (True, False, False),
    }
    assert tuple(grad is not None for grad in grads) == reads[inputs]
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_the_sum_is_not_normalised():
    head = NoTargetHead(8, inputs="global").double()
    queries, scores, tokens = case()
    expected = head.mlp(torch.einsum("bn,bnc->bc", scores, queries))[:, 0]
    torch.testing.assert_close(head(queries, scores, tokens), expected)


def test_text_of_padding_only_is_zero():
    head = NoTargetHead(8, inputs="sentence").double()
    queries, scores, tokens = case()
    out = head(queries, scores, tokens * float("nan"), torch.zeros(3, 4, dtype=torch.long))
    torch.testing.assert_close(out, head.mlp(torch.zeros(3, 8, dtype=torch.float64))[:, 0])


@given(padding=st.integers(1, 4), integer=st.booleans())
def test_padding_and_order_of_queries_do_not_matter(padding, integer):
    head = NoTargetHead(8).double()
    queries, scores, tokens = case()
    valid = torch.ones(3, 4, dtype=torch.long if integer else torch.bool)
    valid[0, 2:] = 0
    out = head(queries, scores, tokens, valid)
    longer = torch.cat([tokens, torch.full((3, padding, 8), float("inf"))], dim=1)
    longer_valid = torch.cat([valid, valid.new_zeros(3, padding)], dim=1)
    order = torch.randperm(5)
    torch.testing.assert_close(head(queries[:, order], scores[:, order], longer, longer_valid), out)
    torch.testing.assert_close(head(queries[:1], scores[:1], tokens[:1, :2]), out[:1])


def test_compile_export_and_autocast():
    head = NoTargetHead(8)
    arguments = (*(a.detach().float() for a in case()), torch.ones(3, 4, dtype=torch.bool))
    out = head(*arguments)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(*arguments), out)
    torch.testing.assert_close(torch.export.export(head, arguments).module()(*arguments), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (head(*arguments).float() - out).abs().max() < 3e-2


def test_errors():
    with pytest.raises(ValueError, match="`inputs` must be one of 'both'"):
        NoTargetHead(8, inputs="text")
    queries, scores, tokens = case()
    with pytest.raises(ValueError, match=r"NoTargetHead: `scores` must be \(B, N\)"):
        NoTargetHead(8).double()(queries, scores[:, :2], tokens)
    with pytest.raises(ValueError, match=r"NoTargetHead: `valid` must be \(B, L\)"):
        NoTargetHead(8).double()(queries, scores, tokens, torch.ones(3, 9))
