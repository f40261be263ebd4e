from __future__ import annotations

import pytest
import torch
from torch import nn

from gresbox.blocks import DeformableDecoder, DETRDecoder, LearnedPrior, PointPrior, sine_position
from gresbox.ops import deformable_attention
from gresbox.testing import assert_matches_reference

SMALL = {"num_layers": 2, "num_heads": 2, "ffn_dim": 16}
SIZES = ((6, 5), (3, 2))


def case(batch=2, queries=3, dtype=torch.float32):
    torch.manual_seed(0)
    levels = [torch.randn(batch, 8, *size, dtype=dtype) for size in SIZES]
    return torch.randn(batch, queries, 8, dtype=dtype), torch.rand(batch, queries, 2, dtype=dtype), levels


def test_golden_attention(golden):
    arrays = {name: torch.from_numpy(value) for name, value in golden("igvg_msda").items()}
    shapes = [tuple(shape) for shape in arrays["shapes_hw"].tolist()]
    out = deformable_attention(arrays["value"], shapes, arrays["loc_xy"], arrays["weights"])
    torch.testing.assert_close(out, arrays["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sine_position(4, 6, 16), arrays["sine_pe_8feats_4x6"][0], rtol=0, atol=2e-6)


def self_attended(layer, x, position):
    """Post-norm self-attention with PyTorch's own module, its input weights packed."""
    own = layer.self_attention
    theirs = nn.MultiheadAttention(8, own.num_heads, batch_first=True, dtype=x.dtype)
    parts = (own.q_proj, own.k_proj, own.v_proj)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": own.out_proj.weight,
            "out_proj.bias": own.out_proj.bias,
        }
    )
    return layer.self_norm(x + theirs(x + position, x + position, x, need_weights=False)[0])


def deformable_by_hand(block, queries, points, *levels):
    position = block.prior.position(points)
    reference = points if block.prior.shift is None else points + block.prior.shift(position).sigmoid()
    value = torch.cat([level.flatten(2).mT for level in levels], 1)
    steps = []
    for layer in block.layers:
        queries = self_attended(layer, queries, position)
        read = layer.cross_attention(queries + position, reference[:, :, None].repeat(1, 1, len(levels), 1), value, SIZES)
        queries = layer.ffn(layer.cross_norm(queries + read))
        steps.append(queries)
    return (*steps, reference)


@pytest.mark.parametrize("reference", ["points", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deformable_equals_the_equations_by_hand(reference, dtype):
    def build():
        return DeformableDecoder(8, prior=PointPrior(8, reference=reference), num_levels=2, **SMALL).eval()

    block, exact = build(), build().double()
    for layer in block.layers:
        nn.init.normal_(layer.cross_attention.sampling_offsets.weight, std=0.1)
        nn.init.normal_(layer.cross_attention.attention_weights.weight)
    exact.load_state_dict(block.state_dict())
    block = block.to(dtype)

    def run(queries, points, *levels):
        steps, around = block(queries, points, levels)
        return (*steps, around)

    queries, points, levels = case()
    assert_matches_reference(
        run,
        lambda *inputs: deformable_by_hand(exact, *inputs),
        [queries, points, *levels],
        dtype=dtype,
    )


def test_where_the_priors_look():
    points = torch.rand(2, 3, 2)
    assert PointPrior(8)(points)[1] is points
    shifted = PointPrior(8, reference="shifted")(points)[1] - points
    assert (shifted > 0).all() and (shifted < 1).all()
    prior = LearnedPrior(8, 3)
    assert torch.equal(prior(points)[0], prior(torch.zeros(2, 3, 2))[0])
    assert torch.equal(prior(points)[1], prior(torch.zeros(2, 3, 2))[1])
    assert LearnedPrior(8, 3, reference=False)(points)[1] is None


def test_it_reads_around_its_points():
    """Far from a point nothing is read, so nothing changes there."""
    block = DeformableDecoder(8, num_levels=1, num_layers=1, num_heads=2, num_points=1, ffn_dim=16).eval()
    queries, points, level = torch.randn(1, 1, 8), torch.tensor([[[0.125, 0.125]]]), torch.randn(1, 8, 8, 8, requires_grad=True)
    grad = torch.autograd.grad(block(queries, points, [level])[0][-1].square().sum(), level)[0]
    touched = grad.abs().sum((0, 1)).nonzero()
    assert len(touched) and touched.max() <= 2  # head directions are right and left, one pixel away


@pytest.mark.parametrize("levels", [1, 2])
def test_detr_equals_the_equations_by_hand(levels):
    block = DETRDecoder(8, 3, **SMALL).eval().double()
    queries, points, maps = case(dtype=torch.float64)
    maps = maps[:levels]
    steps, reference = block(queries, points, maps)
    assert reference is None
    position = block.prior.position
    key = torch.cat([(m + sine_position(*m.shape[-2:], 8, dtype=m.dtype)).flatten(2).mT for m in maps], 1)
    value = torch.cat([m.flatten(2).mT for m in maps], 1)
    for layer, step in zip(block.layers, steps, strict=True):
        queries = self_attended(layer, queries, position)
        q, k, v = layer.cross_attention.project(queries + position, key, value)
        read = layer.cross_attention.merge((q @ k.mT / 2).softmax(-1) @ v)
        queries = layer.ffn(layer.cross_norm(queries + read))
        torch.testing.assert_close(step, queries)


@pytest.mark.parametrize("kind", [DeformableDecoder, DETRDecoder])
def test_queries_and_images_can_change_places(kind):
    options = {"num_levels": 2} if kind is DeformableDecoder else {"num_queries": 3}
    block = kind(8, **options, **SMALL).eval().double()
    queries, points, levels = case(batch=3, dtype=torch.float64)
    steps, _ = block(queries, points, levels)
    images = torch.tensor([2, 0, 1])
    other, _ = block(queries[images], points[images], [level[images] for level in levels])
    torch.testing.assert_close(other[-1], steps[-1][images])
    if kind is DeformableDecoder:  # learned positions stay where they are
        order = torch.tensor([1, 2, 0])
        torch.testing.assert_close(block(queries[:, order], points[:, order], levels)[0][-1], steps[-1][:, order])


@pytest.mark.parametrize("kind", [DeformableDecoder, DETRDecoder])
def test_dropout_acts_in_training_alone(kind):
    options = {"num_levels": 2} if kind is DeformableDecoder else {"num_queries": 3}
    block = kind(8, dropout=0.5, **options, **SMALL)
    inputs = case()
    steps = [block.train(mode)(*inputs)[0][-1] for mode in (True, True, False, False)]
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[2], steps[3])
    still = kind(8, dropout=0.0, **options, **SMALL)
    torch.testing.assert_close(still.train()(*inputs)[0][-1], still.eval()(*inputs)[0][-1])


def test_errors():
    queries, points, levels = case()
    with pytest.raises(ValueError, match="PointPrior: `reference` must be one of 'points', 'shifted', got 'none'"):
        PointPrior(8, reference="none")
    with pytest.raises(ValueError, match=r"LearnedPrior: `points` must be \(B, 4, 2\), got \(2, 3, 2\)"):
        LearnedPrior(8, 4)(points)
    with pytest.raises(ValueError, match="DeformableDecoder: `levels` must be 4 maps, got 2"):
        DeformableDecoder(8, num_heads=2)(queries, points, levels)
    block = DeformableDecoder(8, num_levels=2, **SMALL)
    with pytest.raises(ValueError, match=r"DeformableDecoder: `points` must be \(B, N, 2\) with N=3, got \(2, 2, 2\)"):
        block(queries, points[:, :2], levels)
    with pytest.raises(ValueError, match=r"`levels\[1\]` must be \(B, 8, \*, \*\)"):
        block(queries, points, [levels[0], torch.zeros(2, 4, 3, 2)])
    with pytest.raises(ValueError, match="`prior` must give reference points to look around, got None"):
        DeformableDecoder(8, prior=LearnedPrior(8, 3, reference=False), num_levels=2, **SMALL)(queries, points, levels)
    with pytest.raises(ValueError, match="DETRDecoder: `levels` must hold at least one map, got none"):
        DETRDecoder(8, 3, **SMALL)(queries, points, [])
    with pytest.raises(ValueError, match="`num_layers` must be at least 1, got 0"):
        DETRDecoder(8, num_layers=0)
