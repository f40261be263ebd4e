from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.blocks import ScoreTextSelector


@pytest.mark.parametrize("case", range(3))
def test_golden(golden, case):
    arrays = golden("igvg_sts")
    tokens, valid = (torch.from_numpy(arrays[f"c{case}_{name}"]) for name in ("text_feat", "valid_mask"))
    selected, selected_valid, indices = ScoreTextSelector(int(arrays[f"c{case}_num"]), score="mean")(tokens, valid)
    torch.testing.assert_close(selected, torch.from_numpy(arrays[f"c{case}_sel_feat"]), rtol=0, atol=0)
    assert torch.equal(selected_valid, torch.from_numpy(arrays[f"c{case}_sel_mask"]).bool())
    assert torch.equal(indices >= 0, selected_valid)


def by_hand(tokens, valid, count, score):
    """Positions of one text, the first choice first."""
    real = [position for position in range(len(tokens)) if valid[position]]
    if len(real) < count:
        return real + [-1] * (count - len(real))
    value = {p: tokens[p].norm() if score == "l2" else tokens[p].mean() for p in real}
    return sorted(real, key=lambda p: (-value[p], p))[:count]


@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from(["l2", "mean"]), st.integers(0, 10**6))
def test_equals_the_choice_by_hand(length, count, score, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, length, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(3, length, generator=generator) > 0.4  # padding anywhere
    poisoned = tokens.masked_fill(~valid[..., None], float("nan"))
    selected, selected_valid, indices = ScoreTextSelector(count, score=score)(poisoned, valid)
    assert indices.tolist() == [by_hand(*row, count, score) for row in zip(tokens, valid, strict=True)]
    assert torch.equal(selected_valid, indices >= 0)
    for image in range(3):
        for place, position in enumerate(indices[image].tolist()):
            want = tokens[image, position] if position >= 0 else torch.zeros(4, dtype=torch.float64)
            assert torch.equal(selected[image, place], want)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(ScoreTextSelector(count, score=score)(poisoned[order], valid[order])[2], indices[order])


@pytest.mark.parametrize("count", [3, 9])
def test_a_text_of_padding_only_gives_zeros(count):
    tokens = torch.full((1, 5, 2), float("inf"))
    selected, selected_valid, indices = ScoreTextSelector(count)(tokens, torch.zeros(1, 5, dtype=torch.long))
    assert not selected.any()
    assert not selected_valid.any()
    assert (indices == -1).all()


def test_more_tokens_than_the_text_has():
    tokens = torch.randn(2, 3, 4)
    selected, selected_valid, indices = ScoreTextSelector(5)(tokens)
    assert torch.equal(selected[:, :3], tokens)
    assert not selected[:, 3:].any()
    assert indices.tolist() == [[0, 1, 2, -1, -1]] * 2
    assert selected_valid.tolist() == [[True, True, True, False, False]] * 2


def test_the_two_scores_differ_and_ties_keep_the_order():
    tokens = torch.tensor([[[1.0, 1.0], [-5.0, 0.0], [1.0, 1.0]]])
    assert ScoreTextSelector(2)(tokens)[2].tolist() == [[1, 0]]
    assert ScoreTextSelector(2, score="mean")(tokens)[2].tolist() == [[0, 2]]


def test_gradient_reaches_the_chosen_tokens_alone():
    tokens = torch.randn(1, 6, 3, requires_grad=True)
    selected, _, indices = ScoreTextSelector(2)(tokens, torch.tensor([[1, 1, 1, 1, 0, 0]]))
    (grad,) = torch.autograd.grad(selected.sum(), tokens)
    touched = grad.abs().sum(-1)[0].nonzero()[:, 0]
    assert sorted(touched.tolist()) == sorted(indices[0].tolist())


def test_compile_export_and_half_precision():
    selector = ScoreTextSelector(3)
    tokens, valid = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    out = selector(tokens, valid)
    for other in (
        torch.compile(selector, fullgraph=True, backend="aot_eager")(tokens, valid),
        torch.export.export(selector, (tokens, valid)).module()(tokens, valid),
    ):
        assert all(torch.equal(a, b) for a, b in zip(out, other, strict=True))
    low = selector(tokens.bfloat16(), valid)
    assert low[0].dtype == torch.bfloat16
    assert torch.equal(low[1], out[1])


def test_errors():
    with pytest.raises(ValueError, match="ScoreTextSelector: `num_tokens` must be at least 1, got 0"):
        ScoreTextSelector(0)
    with pytest.raises(ValueError, match="`score` must be one of 'l2', 'mean', got 'max'"):
        ScoreTextSelector(3, score="max")
    with pytest.raises(ValueError, match=r"ScoreTextSelector: `valid` must be \(B, L\) with L=5, got \(2, 4\)"):
        ScoreTextSelector(3)(torch.zeros(2, 5, 4), torch.ones(2, 4))
