from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.blocks import AttentionGuidedQueryGeneration, DistScorePointSelector, ScoreTextSelector, sine_position
from gresbox.testing import assert_matches_reference

OFFICIAL = {"text_selector": partial(ScoreTextSelector, score="mean"), "pooling": "max"}
SMALL = {"num_heads": 4, "ffn_dim": 32}


@pytest.mark.parametrize("case", range(2))
def test_golden(golden, instancevg_weights, load, case):
    arrays = golden("igvg_aqg")
    text, padding, image, weight, *want = (
        torch.from_numpy(arrays[f"c{case}_{name}"])
        for name in ("text_feat", "pad_mask", "img_feat", "W", "q_init", "points_xy", "attn_global", "attn_query")
    )
    selector = partial(DistScorePointSelector, distance_weight=float(weight))
    block = AttentionGuidedQueryGeneration(64, want[0].shape[1], point_selector=selector, **OFFICIAL)
    generated = load(block, instancevg_weights("aqg.", arrays)["ours"])(text, image, 1 - padding)
    got = (generated.queries, generated.points, generated.minimap, generated.attention)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def by_hand(block, tokens, features, valid):
    """The block's equations with loops over images and words, in the input's dtype: queries and minimap."""
    queries, maps = [], []
    dim, heads = tokens.shape[-1], block.num_heads
    for text, image, real in zip(tokens, features, valid, strict=True):
        words, _, positions = block.text_selector(text[None], real[None])
        memory = image.flatten(1).T
        key = block.k_proj(memory + sine_position(*image.shape[1:], dim, dtype=text.dtype).flatten(1).T)
        shares = []
        for word in words[0]:
            query = block.q_proj(word + block.content)
            logits = [q @ k.T / math.sqrt(dim // heads) for q, k in zip(query.chunk(heads), key.chunk(heads, -1), strict=True)]
            shares.append(torch.stack(logits).softmax(-1))  # (heads, P)
        shares = torch.stack(shares)  # (K, heads, P)
        kept = shares.mean(1)[positions[0] >= 0]
        empty = torch.zeros(memory.shape[0], dtype=text.dtype)
        minimap = empty if not len(kept) else kept.mean(0) if block.pooling == "mean" else kept.amax(0)
        maps.append(minimap.view(image.shape[1:]))
        indices, _ = block.point_selector(maps[-1][None])
        inject = block.inject
        value = inject.v_proj(memory).chunk(heads, -1)
        read = torch.stack([torch.cat([s @ v for s, v in zip(share, value, strict=True)]) for share in shares])
        text_part = inject.output_norm(inject.ffn(inject.attention_norm(block.content + inject.out_proj(read))))
        queries.append(inject.mlp(torch.cat([text_part, memory[indices[0]]], -1)))
    return torch.stack(queries), torch.stack(maps)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equations_by_hand(pooling, dtype):
    block = AttentionGuidedQueryGeneration(16, 3, pooling=pooling, **SMALL).eval()
    torch.nn.init.normal_(block.content)
    reference = AttentionGuidedQueryGeneration(16, 3, pooling=pooling, **SMALL).double().eval()
    reference.load_state_dict(block.state_dict())
    block = block.to(dtype)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    tokens, features = torch.randn(3, 6, 16), torch.randn(3, 16, 4, 5)

    def run(tokens, features):
        generated = block(tokens, features, valid)
        return generated.queries, generated.minimap

    assert_matches_reference(run, lambda t, f: by_hand(reference, t, f, valid), [tokens, features], dtype=dtype)


def small(**options):
    return AttentionGuidedQueryGeneration(16, 4, **SMALL | options)


def case(batch=3, length=6):
    torch.manual_seed(0)
    return torch.randn(batch, length, 16), torch.randn(batch, 16, 4, 5)


def test_points_are_where_the_indices_say_and_queries_know_their_points():
    tokens, features = case()
    generated = small(inject_text=False).eval()(tokens, features)
    column, row = (generated.points * torch.tensor([5, 4])).floor().long().unbind(-1)
    assert torch.equal(generated.indices, row * 5 + column)
    for image in range(3):
        assert torch.equal(generated.queries[image], features[image][:, row[image], column[image]].T)


def test_maps_are_attention():
    generated = small().eval()(*case())
    torch.testing.assert_close(generated.attention.sum((-2, -1)), torch.ones(3, 4))
    torch.testing.assert_close(generated.minimap, generated.attention.mean(1))
    torch.testing.assert_close(small(pooling="max").eval()(*case()).minimap.shape, generated.minimap.shape)


def test_the_map_holds_no_dropout_noise():
    block, (tokens, features) = small(dropout=0.5), case()
    block.inject.ffn.dropout = 0.0  # what is left is the attention's own
    noisy = block.train()(tokens, features)
    calm = block.eval()(tokens, features)
    assert torch.equal(noisy.minimap, calm.minimap)
    assert not torch.equal(noisy.queries, calm.queries)


def test_logits_are_the_map_before_the_softmax():
    tokens, features = case()
    block = AttentionGuidedQueryGeneration(16, 1, num_heads=1, ffn_dim=32, minimap="logits").eval()
    generated = block(tokens, features)
    probs = generated.minimap.flatten(1).softmax(1)
    torch.testing.assert_close(probs, generated.attention[:, 0].flatten(1))


@given(st.integers(1, 4), st.booleans())
def test_padding_and_the_rest_of_the_batch_do_not_matter(padding, integer):
    block, (tokens, features) = small().eval(), case()
    valid = torch.ones(3, 6, dtype=torch.long if integer else torch.bool)
    valid[0, 4:] = 0
    valid[1, 2:] = 0
    out = block(tokens, features, valid)
    longer = torch.cat([tokens, torch.full((3, padding, 16), float("nan"))], 1)
    padded = block(longer, features, F.pad(valid, (0, padding)))
    order = torch.tensor([2, 0, 1])
    mixed = block(tokens[order], features[order], valid[order])
    for name in ("queries", "points", "indices", "minimap", "attention", "words"):
        torch.testing.assert_close(getattr(padded, name), getattr(out, name))
        torch.testing.assert_close(getattr(mixed, name), getattr(out, name)[order])


def test_a_text_of_padding_only():
    block, (tokens, features) = small().eval(), case()
    generated = block(torch.full_like(tokens, float("inf")), features, torch.zeros(3, 6, dtype=torch.long))
    assert not generated.minimap.any()
    assert generated.indices.tolist() == [[0, 19, 3, 15]] * 3  # all equal: only distance counts
    assert generated.queries.isfinite().all()
    assert (generated.words == -1).all()


def test_more_queries_than_words():
    tokens, features = case(length=2)
    generated = small().eval()(tokens, features)
    assert generated.queries.shape == (3, 4, 16)
    assert generated.words.tolist() == [[0, 1, -1, -1]] * 3
    torch.testing.assert_close(generated.minimap, generated.attention[:, :2].mean(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "max"},
        {"minimap": "logits"},
        {"inject_text": False},
        {"inject_text": False, "text_selector": None},
        {"point_selector": partial(DistScorePointSelector, distance_weight=0.0)},
    ],
)
@pytest.mark.parametrize("real", [6, 2])
def test_every_parameter_gets_a_gradient(options, real):
    block, (tokens, features) = small(**options), case()
    valid = torch.arange(6).expand(3, -1) < real
    generated = block(tokens, features, valid)
    (generated.queries.square().sum() + generated.minimap.square().sum()).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_without_a_text_selector_all_words_take_part():
    tokens, features = case()
    valid = torch.tensor([[1, 1, 1, 0, 0, 0]] * 3)
    generated = small(text_selector=None, inject_text=False).eval()(tokens, features, valid)
    assert generated.attention.shape == (3, 6, 4, 5)
    torch.testing.assert_close(generated.minimap, generated.attention[:, :3].mean(1))
    assert generated.words.tolist() == [[0, 1, 2, -1, -1, -1]] * 3


def test_autocast():
    block, (tokens, features) = small().eval(), case()
    out = block(tokens, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(tokens, features)
    assert low.minimap.dtype == torch.float32
    torch.testing.assert_close(low.minimap, out.minimap, rtol=0.05, atol=1e-3)


def test_errors():
    who = "AttentionGuidedQueryGeneration: "
    with pytest.raises(ValueError, match=who + "`dim` must be a multiple of 4 and of num_heads=8, got 20"):
        AttentionGuidedQueryGeneration(20)
    with pytest.raises(ValueError, match="`pooling` must be one of 'mean', 'max', got 'sum'"):
        small(pooling="sum")
    with pytest.raises(ValueError, match="`minimap` must be one of 'probs', 'logits'"):
        small(minimap="attention")
    with pytest.raises(ValueError, match="`inject_text` must be False without a text selector"):
        small(text_selector=None)
    tokens, features = case()
    with pytest.raises(ValueError, match=who + r"`num_queries` must be in \[1, 20\], got 21"):
        AttentionGuidedQueryGeneration(16, 21, **SMALL)(tokens, features)
    with pytest.raises(ValueError, match=who + r"`tokens` must be \(B, L, 16\), got \(3, 6, 8\)"):
        small()(tokens[..., :8], features)
    with pytest.raises(ValueError, match=who + r"`valid` must be \(B, L\) with L=6, got \(3, 4\)"):
        small()(tokens, features, torch.ones(3, 4))
