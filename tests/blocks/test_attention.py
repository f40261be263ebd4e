from __future__ import annotations

import pytest
import torch
from torch import nn

from gresbox.blocks import MultiHeadAttention


def _torch_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    dim = ours.out_proj.weight.shape[0]
    theirs = nn.MultiheadAttention(dim, ours.num_heads, batch_first=True).double()
    inputs = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return theirs


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(masked):
    ours = MultiHeadAttention(16, 4).double()
    for layer in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
        nn.init.normal_(layer.bias)
    theirs = _torch_attention(ours)
    query, key, value = (torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))
    logits = torch.randn(2, 5, 9) if masked else None
    blocked = None if logits is None else (logits < 0).repeat_interleave(4, 0)
    out, reference = ours(query, key, value, logits), theirs(query, key, value, attn_mask=blocked)[0]
    torch.testing.assert_close(out, reference)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (query, key, value))
    torch.testing.assert_close(got, torch.autograd.grad((reference * weight).sum(), (query, key, value)))


def test_attention_starts_as_mask2formers_does():
    """It applies Xavier to the packed (3C, C) matrix, whose bound is sqrt(6 / 4C), and to the output, sqrt(6 / 2C)."""
    attention = MultiHeadAttention(128, 8)
    for layer, bound in ((attention.q_proj, 4), (attention.k_proj, 4), (attention.v_proj, 4), (attention.out_proj, 2)):
        limit = (6 / (bound * 128)) ** 0.5
        assert 0.98 * limit < layer.weight.abs().max() <= limit
        assert not layer.bias.any()


def test_attention_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of num_heads=3"):
        MultiHeadAttention(16, 3)
