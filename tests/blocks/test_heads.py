from __future__ import annotations

import pytest
import torch
from torch import nn

from gresbox.blocks import MLP, FeedForward


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
