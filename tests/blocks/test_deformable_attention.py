from __future__ import annotations

import pytest
import torch

from gresbox.blocks import DeformableAttention


@pytest.fixture
def case(golden):
    arrays = {
        key[len("module/") :]: torch.from_numpy(value) for key, value in golden("m2f_msda").items() if key.startswith("module/")
    }
    module = DeformableAttention(32, num_levels=3, num_heads=4).double()
    module.load_state_dict({key[3:]: value for key, value in arrays.items() if key.startswith("sd/")})
    shapes = [tuple(shape) for shape in arrays["spatial_shapes"].tolist()]
    return module, arrays, shapes


@pytest.mark.parametrize(
    ("output", "reference", "padded"),
    [("out_2d", "reference_points", False), ("out_2d_padded", "reference_points", True), ("out_4d", "reference_points4", False)],
)
def test_module_is_the_official_one(case, output, reference, padded):
    module, arrays, shapes = case
    valid = ~arrays["padding_mask"] if padded else None
    out = module(arrays["query"].double(), arrays[reference].double(), arrays["input_flatten"].double(), shapes, valid)
    torch.testing.assert_close(out, arrays[output], atol=1e-6, rtol=1e-6)


def test_initial_offsets_are_the_official_ones(golden):
    module = DeformableAttention(32, num_levels=3, num_heads=4)
    torch.testing.assert_close(
        module.sampling_offsets.bias, torch.from_numpy(golden("m2f_msda")["module_init/sampling_offsets.bias"]).float()
    )
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()
    assert not module.attention_weights.bias.any()


def test_autocast_does_not_blur_the_locations(case):
    """The output under autocast stays close although the location of a point needs more bits than bfloat16 has."""
    module, arrays, shapes = case
    module = module.float()
    inputs = [arrays[key].float() for key in ("query", "reference_points", "input_flatten")]
    exact = module._locations(*inputs[:2], shapes)[0]
    seen = {}
    original = module._locations
    module._locations = lambda *a: seen.setdefault("locations", original(*a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(*inputs, shapes)
    assert seen["locations"][0].dtype == torch.float32
    torch.testing.assert_close(seen["locations"][0], exact)


def test_errors():
    with pytest.raises(ValueError, match="multiple of num_heads=5"):
        DeformableAttention(32, num_heads=5)
    module = DeformableAttention(8, num_levels=1, num_heads=2)
    query, value = torch.randn(1, 2, 8), torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match=r"`reference` must end in 2 .* got 3"):
        module(query, torch.rand(1, 2, 1, 3), value, [(2, 2)])
    with pytest.raises(ValueError, match=r"`reference` must be \(B, Q, 1, \*\)"):
        module(query, torch.rand(1, 2, 2, 2), value, [(2, 2)])
    with pytest.raises(ValueError, match="`valid` must be"):
        module(query, torch.rand(1, 2, 1, 2), value, [(2, 2)], torch.ones(1, 3, dtype=torch.bool))
