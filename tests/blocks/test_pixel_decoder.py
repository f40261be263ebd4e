from __future__ import annotations

import math

import pytest
import torch

from gresbox.blocks import MSDeformPixelDecoder

CHANNELS = (8, 16, 24, 32)


def small_decoder(**options) -> MSDeformPixelDecoder:
    return MSDeformPixelDecoder(CHANNELS, 32, **{"mask_dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 64} | options)


@pytest.fixture(scope="module")
def arrays(golden):
    return {key: value if key == "key_map" else torch.from_numpy(value) for key, value in golden("m2f_pixel_decoder").items()}


def hugging_face(arrays, prefix=""):
    return {prefix + key[3:]: value for key, value in arrays.items() if key.startswith("hf/")}


def official(arrays, prefix=""):
    weights = hugging_face(arrays)
    return {prefix + str(theirs): weights[str(hf)] for hf, theirs in arrays["key_map"]}


def check_outputs(decoder, arrays):
    pixels, memories = decoder.double()([arrays[f"in/res{i}"].double() for i in (2, 3, 4, 5)])
    torch.testing.assert_close(pixels, arrays["out/mask_features"], atol=1e-5, rtol=1e-5)
    for index, memory in enumerate(memories):
        torch.testing.assert_close(memory, arrays[f"out/ms{index}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [hugging_face, official])
@pytest.mark.parametrize("prefixed", [False, True])
def test_weights_of_mask2former_give_its_outputs(arrays, names, prefixed):
    prefix = {hugging_face: "model.pixel_level_module.decoder.", official: "sem_seg_head.pixel_decoder."}[names] if prefixed else ""
    state = names(arrays, prefix)
    if prefixed:  # a whole model's other parameters are left alone
        state["model.transformer_module.level_embed.weight"] = torch.zeros(3, 32)
    decoder = small_decoder()
    decoder.load_mask2former(state)
    check_outputs(decoder, arrays)


def test_intermediate_results(arrays):
    decoder = small_decoder()
    decoder.load_mask2former(hugging_face(arrays))
    decoder.double()
    projected = [layer(arrays[f"in/res{5 - i}"].double()) for i, layer in enumerate(decoder.input_projections)]
    for index, level in enumerate(projected):
        torch.testing.assert_close(level, arrays[f"mid/input_proj{index}"], atol=1e-6, rtol=1e-6)
    seen = {}
    decoder.layers[0].register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs, output=output))
    decoder._encode(projected)
    _, position, reference, _ = seen["inputs"]
    torch.testing.assert_close(reference, arrays["mid/reference_points"], atol=1e-6, rtol=0)
    torch.testing.assert_close(position.expand(2, -1, -1), arrays["mid/pos_plus_level"], atol=3e-6, rtol=0)
    torch.testing.assert_close(seen["output"], arrays["mid/enc_layer0_out"], atol=1e-5, rtol=1e-5)


def test_equals_transformers_own_class():
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    config = Mask2FormerConfig(
        feature_size=64, mask_feature_size=32, encoder_layers=2, encoder_feedforward_dim=48, num_attention_heads=4, dropout=0.0
    )
    theirs = Mask2FormerPixelDecoder(config, list(CHANNELS)).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # built without the model's own initialisation
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    ours = MSDeformPixelDecoder(CHANNELS, 64, mask_dim=32, num_layers=2, num_heads=4, ffn_dim=48).double()
    ours.load_mask2former(theirs.state_dict())
    sizes = ((20, 14), (10, 7), (5, 4), (3, 2))
    features = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip(CHANNELS, sizes, strict=True)]
    reference = theirs(features)
    pixels, memories = ours(features)
    torch.testing.assert_close(pixels, reference.mask_features, atol=1e-6, rtol=1e-6)
    for memory, other in zip(memories, reference.multi_scale_features, strict=True):
        torch.testing.assert_close(memory, other, atol=1e-6, rtol=1e-6)


def test_strict_loading_says_everything_in_one_line(arrays):
    state = hugging_face(arrays)
    state["level_embed"] = torch.zeros(3, 8)
    state["encoder.layers.7.fc1.bias"] = torch.zeros(64)
    state["bogus"] = torch.zeros(1)
    del state["mask_projection.bias"], state["layer_1.1.bias"]
    decoder = small_decoder()
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    with pytest.raises(ValueError, match="load_mask2former") as caught:
        decoder.load_mask2former(state)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("2 missing", "mask_projection.bias", "2 unexpected", "bogus", "layers.7", "level_embedding (3, 8) for (3, 32)"):
        assert part in message
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())


def test_many_missing_names_are_counted():
    with pytest.raises(ValueError, match=r"53 missing \(.*and 50 more\)"):
        small_decoder().load_mask2former({})


def test_paper_size_has_5_54_million_parameters():
    with torch.device("meta"):
        decoder = MSDeformPixelDecoder((128, 256, 512, 1024))
    assert sum(p.numel() for p in decoder.parameters()) == 5_544_384


def test_initialisation():
    decoder = MSDeformPixelDecoder((128, 256, 512, 1024), num_layers=1)

    def uniform(weight, bound):
        assert 0.97 * bound < weight.abs().max() <= bound

    for projection, channels in zip(decoder.input_projections, (1024, 512, 256), strict=True):
        uniform(projection[0].weight, math.sqrt(6 / (channels + 256)))
        assert not projection[0].bias.any()
    uniform(decoder.lateral[0].weight, math.sqrt(3 / 128))
    uniform(decoder.smooth[0].weight, math.sqrt(3 / (256 * 9)))
    uniform(decoder.mask_projection.weight, math.sqrt(3 / 256))
    assert not decoder.mask_projection.bias.any()
    assert 0.9 < decoder.level_embedding.std() < 1.1
    layer = decoder.layers[0]
    uniform(layer.attention.value_proj.weight, math.sqrt(6 / 512))
    uniform(layer.attention.output_proj.weight, math.sqrt(6 / 512))
    uniform(layer.ffn.linear1.weight, math.sqrt(6 / (256 + 1024)))
    uniform(layer.ffn.linear2.weight, math.sqrt(6 / (256 + 1024)))


def tiny_maps(batch=2, dtype=torch.float32):
    return [torch.randn(batch, c, *s, dtype=dtype) for c, s in zip(CHANNELS, ((12, 16), (6, 8), (3, 4), (2, 2)), strict=True)]


def test_every_parameter_gets_a_gradient():
    decoder = small_decoder()
    pixels, memories = decoder(tiny_maps())
    (pixels.square().sum() + sum(m.square().sum() for m in memories)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_batch_composition_does_not_matter():
    decoder = small_decoder().double()
    maps = tiny_maps(3, torch.float64)
    pixels, memories = decoder(maps)
    alone, levels = decoder([m[1:2] for m in maps])
    torch.testing.assert_close(pixels[1:2], alone)
    for memory, level in zip(memories, levels, strict=True):
        torch.testing.assert_close(memory[1:2], level)


def test_dims_that_32_groups_do_not_divide():
    pixels, memories = small_decoder_of(48)(tiny_maps())
    assert pixels.shape == (2, 48, 12, 16)
    assert [tuple(m.shape) for m in memories] == [(2, 48, 2, 2), (2, 48, 3, 4), (2, 48, 6, 8)]


def small_decoder_of(dim):
    return MSDeformPixelDecoder(CHANNELS, dim, num_layers=1, num_heads=4, ffn_dim=32)


def test_compile_export_and_autocast():
    decoder, maps = small_decoder(num_layers=1), tiny_maps()
    pixels, _ = decoder(maps)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps)[0], pixels)
    exported = torch.export.export(decoder, (maps,)).module()
    torch.testing.assert_close(exported(maps)[0], pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = decoder(maps)[0].float()
    assert (low - pixels).norm() / pixels.norm() < 3e-2


def test_errors():
    with pytest.raises(ValueError, match="`in_channels` must be four numbers"):
        MSDeformPixelDecoder((8, 16, 24), 32)
    with pytest.raises(ValueError, match="`dim` must be a multiple of 4, got 30"):
        MSDeformPixelDecoder(CHANNELS, 30)
    decoder, maps = small_decoder(num_layers=1), tiny_maps()
    with pytest.raises(ValueError, match="`features` must be four maps"):
        decoder(maps[:3])
    with pytest.raises(ValueError, match=r"`features\[1\]` must be \(B, 16, \*, \*\)"):
        decoder([maps[0], maps[0], *maps[2:]])


def test_pixel_position_tells_equal_places_apart():
    torch.manual_seed(0)
    maps = [
        torch.ones(1, channels, 16 // stride, 16 // stride) for channels, stride in zip((8, 16, 24, 32), (1, 2, 4, 8), strict=True)
    ]
    decoder = MSDeformPixelDecoder((8, 16, 24, 32), 32, num_layers=0, num_heads=4, pixel_position=True)
    inside = decoder(maps)[0][0, :, 4:12, 4:12].flatten(1)
    assert inside.std(1).max() > 0.1
    decoder.pixel_position = False
    assert decoder(maps)[0][0, :, 4:12, 4:12].flatten(1).std(1).max() < 1e-4
