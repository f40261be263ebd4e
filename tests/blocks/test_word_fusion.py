import pytest
import torch
from torch.nn import functional as F

from gresbox.blocks import PixelWordFusion


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, 8, 3, 4, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype)


def test_equals_its_formula_with_outputs_and_gradients():
    features, tokens = (x.requires_grad_() for x in inputs())
    block = PixelWordFusion(8, 6).double()
    rows = features.flatten(2).transpose(1, 2)
    weights = (block.q_proj(rows) @ block.k_proj(tokens).transpose(1, 2) / 8**0.5).softmax(-1)
    fused = block.out_proj(F.relu(block.m_proj(rows)) * block.w_proj(weights @ block.v_proj(tokens)))
    first, _, second, _ = block.gate
    expected = rows + torch.tanh(F.relu(fused @ first.weight.T) @ second.weight.T) * fused
    expected = expected.transpose(1, 2).reshape(features.shape)
    actual = block(features, tokens)
    torch.testing.assert_close(actual, expected)
    wanted, got = (torch.autograd.grad(out.square().sum(), [features, tokens, *block.parameters()]) for out in (expected, actual))
    torch.testing.assert_close(got, wanted)


def test_padding_and_what_stands_in_it_do_not_matter():
    features, tokens = inputs()
    block = PixelWordFusion(8, 6).double()
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spoiled = tokens.clone()
    spoiled[0, 3:] = float("nan")
    out = block(features, spoiled, valid)
    torch.testing.assert_close(out[:1], block(features[:1], tokens[:1, :3]))
    torch.testing.assert_close(out[1:], block(features[1:], tokens[1:]))


def test_a_text_of_padding_alone_stays_finite():
    features, tokens = (x.requires_grad_() for x in inputs())
    out = PixelWordFusion(8, 6).double()(features, tokens, torch.zeros(2, 5, dtype=torch.bool))
    out.sum().backward()
    assert out.isfinite().all() and features.grad.isfinite().all() and tokens.grad.eq(0).all()


def test_pixels_and_words_may_change_their_order():
    features, tokens = inputs()
    block = PixelWordFusion(8, 6).double()
    torch.testing.assert_close(block(features.flip(-1), tokens.flip(1)), block(features, tokens).flip(-1))


def test_compiles_to_one_graph():
    features, tokens = inputs(torch.float32)
    block = PixelWordFusion(8, 6)
    valid = torch.ones(2, 5, dtype=torch.bool)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, tokens, valid), block(features, tokens, valid))


def test_wrong_inputs_are_one_clear_line():
    features, tokens = inputs()
    with pytest.raises(ValueError, match=r"PixelWordFusion: `dim` must be at least 1, got 0\."):
        PixelWordFusion(0, 6)
    with pytest.raises(ValueError, match=r"PixelWordFusion: `valid` must be \(B, L\)"):
        PixelWordFusion(8, 6).double()(features, tokens, torch.ones(2, 4))


def test_places_tell_equal_pixels_apart():
    _, tokens = inputs()
    features = torch.ones(2, 8, 3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    plain, placed = (PixelWordFusion(8, 6, position=position).double() for position in (False, True))
    placed.load_state_dict(plain.state_dict())
    assert torch.equal(plain(features, tokens)[..., 0, 0], plain(features, tokens)[..., 2, 3])
    assert not torch.allclose(placed(features, tokens)[..., 0, 0], placed(features, tokens)[..., 2, 3])
    with pytest.raises(ValueError, match=r"PixelWordFusion: `dim` must be a multiple of 4 with position=True, got 6\."):
        PixelWordFusion(6, 6, position=True)
