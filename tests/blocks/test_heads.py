from __future__ import annotations

import pytest
import torch
from torch import nn

from gresbox.blocks import MLP, BoxHead, ExistenceHead, FeedForward, GlobalMaskHead, InstanceHead, inverse_sigmoid
from gresbox.testing import assert_matches_reference


def test_mlp_is_linear_relu_linear():
    mlp = MLP(5, 7, 2, num_layers=3)
    plain = nn.Sequential(mlp.layers[0], nn.ReLU(), mlp.layers[1], nn.ReLU(), mlp.layers[2])
    x = torch.randn(4, 3, 5)
    assert torch.equal(mlp(x), plain(x))
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(7, 5), (7, 7), (2, 7)]


def test_mlp_of_no_layer():
    with pytest.raises(ValueError, match="`num_layers` must be at least 1, got 0"):
        MLP(5, 7, 2, num_layers=0)


def test_feed_forward_is_post_norm():
    ffn = FeedForward(6, 12).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ffn(x), ffn.norm(x + ffn.linear2(torch.relu(ffn.linear1(x)))))


def test_feed_forward_drops_in_training_alone():
    ffn, x = FeedForward(6, 12, dropout=0.5), torch.randn(2, 5, 6)
    assert not torch.equal(ffn(x), ffn(x))
    plain = FeedForward(6, 12)
    plain.load_state_dict(ffn.state_dict())
    assert torch.equal(ffn.eval()(x), plain(x))


def test_inverse_sigmoid(golden):
    arrays = golden("igvg_msda")
    x, want = torch.from_numpy(arrays["invsig_in"]), torch.from_numpy(arrays["invsig_out"])
    torch.testing.assert_close(inverse_sigmoid(x), want, rtol=1e-6, atol=1e-6)
    inside = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(inside).sigmoid(), inside)
    assert inverse_sigmoid(torch.tensor([-5.0, 5.0])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_are_relative_to_their_points(dtype):
    head = BoxHead(8)
    exact = BoxHead(8).double()
    exact.load_state_dict(head.state_dict())
    head = head.to(dtype)

    def by_hand(queries, reference):
        raw = exact.mlp(queries)
        centre = raw[..., :2] + torch.log(reference / (1 - reference))
        return torch.cat([centre, raw[..., 2:]], -1).sigmoid()

    assert_matches_reference(head, by_hand, [torch.randn(3, 2, 5, 8), torch.rand(2, 5, 2) * 0.9 + 0.05], dtype=dtype)
    queries = torch.randn(2, 5, 8, dtype=dtype)
    torch.testing.assert_close(head(queries), head.mlp(queries).sigmoid())


def test_boxes_start_at_their_points():
    head, points = BoxHead(8), torch.rand(1, 50, 2)
    for layer in head.mlp.layers[:-1]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(head.mlp.layers[-1].bias[:2])
    box = head(torch.randn(1, 50, 8), points)
    torch.testing.assert_close(box[..., :2], points.clamp(0.001, 0.999), rtol=0, atol=1e-3)
    torch.testing.assert_close(box[..., 2:], torch.full((1, 50, 2), 0.1192), rtol=0, atol=1e-4)


def test_global_mask_is_one_linear_map():
    head, pixels = GlobalMaskHead(6), torch.randn(2, 6, 3, 4)
    want = torch.einsum("bchw,c->bhw", pixels, head.predict.weight.flatten()) + head.predict.bias
    torch.testing.assert_close(head(pixels), want)
    plain = head(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(pixels), plain)


@pytest.mark.parametrize("num_logits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_existence_is_the_mean_over_pixels(num_logits, dtype):
    head = ExistenceHead(6, num_logits=num_logits)
    exact = ExistenceHead(6, num_logits=num_logits).double()
    exact.load_state_dict(head.state_dict())

    def by_hand(pixels):
        return torch.stack([exact.mlp(pixels[:, :, y, x]) for y in range(3) for x in range(4)]).mean(0)

    assert_matches_reference(head.to(dtype), by_hand, [torch.randn(2, 6, 3, 4)], dtype=dtype)


def test_no_target_logits_have_the_probability_of_the_two_classes():
    two, one = torch.randn(5, 2), torch.randn(5, 1)
    torch.testing.assert_close(ExistenceHead.no_target(two).sigmoid(), two.softmax(1)[:, 1])
    torch.testing.assert_close(ExistenceHead.no_target(one).sigmoid(), 1 - one.sigmoid()[:, 0])


def test_instance_head_predicts_per_step():
    head = InstanceHead(6)
    steps, pixels, tokens = [torch.randn(2, 5, 6) for _ in range(3)], torch.randn(2, 6, 3, 4), torch.randn(2, 7, 6)
    points, valid = torch.rand(2, 5, 2), torch.ones(2, 7, dtype=torch.bool)
    predictions = head(steps, pixels, tokens, valid, points=points, reference=points)
    assert len(predictions) == 3
    for step, prediction in zip(steps, predictions, strict=True):
        probability = head.class_head(step).softmax(-1)[..., 0]
        torch.testing.assert_close(prediction.score_logits.sigmoid(), probability)
        logits = torch.stack([prediction.score_logits, torch.zeros_like(prediction.score_logits)], -1)
        torch.testing.assert_close(logits.softmax(-1)[..., 0], probability)
        torch.testing.assert_close(prediction.boxes, head.box_head(step, points))
        torch.testing.assert_close(prediction.masks, torch.einsum("bnc,bchw->bnhw", step, pixels))
        assert prediction.pixels is pixels and prediction.points is points and prediction.valid is valid
        assert prediction.queries is step


def test_instance_head_with_a_perceptron_for_masks_and_without_points():
    head = InstanceHead(6, mask_head=MLP(6, 8, 4))
    (prediction,) = head([torch.randn(2, 5, 6)], torch.randn(2, 4, 3, 3), torch.randn(2, 7, 9))
    assert prediction.masks.shape == (2, 5, 3, 3)
    assert prediction.points is None
    (prediction.masks.sum() + prediction.score_logits.sum() + prediction.boxes.sum()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_heads_errors():
    with pytest.raises(ValueError, match="ExistenceHead: `num_logits` must be one of 1, 2, got 3"):
        ExistenceHead(6, num_logits=3)
    with pytest.raises(ValueError, match=r"ExistenceHead: `pixels` must be \(B, 6, h, w\), got \(2, 5, 3, 3\)"):
        ExistenceHead(6)(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"GlobalMaskHead: `pixels` must be \(B, 6, h, w\)"):
        GlobalMaskHead(6)(torch.zeros(2, 5, 3, 3))
    head, pixels, tokens = InstanceHead(6), torch.zeros(2, 6, 3, 3), torch.zeros(2, 7, 6)
    with pytest.raises(ValueError, match="InstanceHead: `steps` must hold at least one decoder layer, got none"):
        head([], pixels, tokens)
    with pytest.raises(ValueError, match=r"InstanceHead: `points` must be \(B, N, 2\) with N=5, got \(2, 4, 2\)"):
        head([torch.zeros(2, 5, 6)], pixels, tokens, points=torch.zeros(2, 4, 2))
