"""Masked attention against the softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import masked, masked_attention
from gresbox.testing import assert_matches_reference


@pytest.fixture(params=["probabilities kept", "PyTorch's attention"], autouse=True)
def form(request, monkeypatch):
    for name in ("_FEW", "_MANY"):
        monkeypatch.setattr(masked, name, 2**40 if request.param == "probabilities kept" else -1)


def _by_hand(query, key, value, mask_logits):
    blocked = mask_logits < 0
    blocked = blocked & ~blocked.all(-1, keepdim=True)
    affinity = query @ key.mT / query.shape[-1] ** 0.5
    return affinity.masked_fill(blocked[:, None], -torch.inf).softmax(-1) @ value


@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 7))
def test_equals_the_softmax_by_hand(batch, heads, queries, pixels):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    query, key, value = (torch.randn(batch, heads, n, 4, dtype=torch.float64) for n in (queries, pixels, pixels))
    logits = torch.randn(batch, queries, pixels, dtype=torch.float64)
    logits[:, ::2] -= 10  # some rows are blocked everywhere
    out = masked_attention(query, key, value, logits)
    torch.testing.assert_close(out, _by_hand(query, key, value, logits))
    order = torch.randperm(pixels)
    torch.testing.assert_close(masked_attention(query, key[:, :, order], value[:, :, order], logits[..., order]), out)


def test_zero_attends_and_the_smallest_negative_does_not():
    query, key, value = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1), torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    out = masked_attention(query, key, value, torch.tensor([[[0.0, -1e-30, -0.0]]]))
    assert out.item() == pytest.approx(50.5)


def test_blocked_pixels_reach_nothing():
    query, key, value = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (3, 6, 6))
    logits = torch.ones(1, 3, 6)
    logits[..., 4:] = -1
    grads = torch.autograd.grad(masked_attention(query, key, value, logits).sum(), (key, value))
    assert all((grad[:, :, 4:] == 0).all() for grad in grads)
    assert (grads[1][:, :, :4] != 0).all()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))
def test_gradients_equal_those_of_the_softmax_by_hand(batch, heads, queries, pixels):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    inputs = [torch.randn(batch, heads, n, 4) for n in (queries, pixels, pixels)]
    logits = torch.randn(batch, queries, pixels)
    logits[:, ::2] -= 10
    ours, by_hand = (lambda q, k, v, f=f: f(q, k, v, logits) for f in (masked_attention, _by_hand))
    assert_matches_reference(ours, by_hand, inputs)


def test_a_backward_pass_under_autocast_is_not_lowered():
    query, key, value = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (3, 6, 6))
    logits = torch.randn(1, 3, 6)
    wanted = torch.autograd.grad(masked_attention(query, key, value, logits).sum(), (query, key, value))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(masked_attention(query, key, value, logits).sum(), (query, key, value))
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact)


def test_the_form_follows_from_size_and_gradients(monkeypatch):
    monkeypatch.undo()
    query, key = torch.randn(1, 8, 100, 32), torch.randn(1, 8, 3600, 32)
    assert masked._worth_keeping(query, key[:, :, :400], key)
    assert not masked._worth_keeping(query, key, key)
    assert masked._worth_keeping(query.clone().requires_grad_(), key, key)
    assert not masked._worth_keeping(query.expand(8, -1, -1, -1), key.expand(8, -1, -1, -1), key.clone().requires_grad_())
    assert not masked._worth_keeping(query[:, :, :1].half(), key, key)


def test_an_image_of_empty_masks_equals_no_mask():
    query, key, value = (torch.randn(2, 2, n, 4) for n in (3, 6, 6))
    everything = masked_attention(query, key, value, torch.ones(2, 3, 6))
    torch.testing.assert_close(masked_attention(query, key, value, -torch.ones(2, 3, 6)), everything)


def test_without_pixels_the_result_is_zero():
    out = masked_attention(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 3, 0))
    assert (out == 0).all()


def test_errors():
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 6, 4)
    with pytest.raises(ValueError, match=r"^masked_attention: `mask_logits` must be \(B, N, P\) with P=6, got \(1, 3, 5\)\.$"):
        masked_attention(query, key, key, torch.zeros(1, 3, 5))
    with pytest.raises(TypeError, match=r"`mask_logits` must be a floating-point tensor, got torch\.bool"):
        masked_attention(query, key, key, torch.zeros(1, 3, 6, dtype=torch.bool))
