from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.blocks import CarisDecoder, CarisLayer, sine_position
from gresbox.models import convert
from gresbox.ops import deformable_attention
from gresbox.testing import assert_matches_reference

CHANNELS = (4, 5, 6, 7)
SHAPES = ((2, 3), (4, 5))
OPTIONS = {"num_heads": 2, "num_points": 2, "ffn_dim": 32, "attention_dim": 32}


@pytest.fixture(scope="module")
def arrays(golden):
    return {name: torch.from_numpy(value) for name, value in golden("caris_decoder").items()}


def released(arrays, part):
    """The golden weights under our names, those of one part without its prefix."""
    state = {name.removeprefix("sd/"): value for name, value in arrays.items() if name.startswith("sd/")}
    weights = convert.caris(state, strict=False)
    return {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}


@pytest.fixture(scope="module")
def official(arrays):
    decoder = CarisDecoder(CHANNELS, 8, num_layers=2, num_prompts=3, **OPTIONS).double()
    decoder.load_state_dict(released(arrays, "decoder."))
    return decoder


def projected(arrays, words):
    """The words after the linear layer and the norm that stand before the decoder."""
    weights = {name: value.double().requires_grad_() for name, value in released(arrays, "text_encoder.").items()}
    tokens = F.linear(words, weights["projection.weight"], weights["projection.bias"])
    return F.layer_norm(tokens, (8,), weights["norm.weight"], weights["norm.bias"]), weights["projection.weight"]


def test_weights_of_the_released_code_give_its_logits_and_gradients(arrays, official):
    features = [arrays[f"in/feature{i}"].double().requires_grad_() for i in range(4)]
    words = arrays["in/words"].double().requires_grad_()
    tokens, projection = projected(arrays, words)
    logits = official(features, tokens, arrays["in/valid"])
    background, foreground = arrays["out/logits"].unbind(1)
    # The released code's sine table is float32.
    torch.testing.assert_close(logits, foreground - background, atol=1e-6, rtol=1e-6)
    theirs = {
        "encoder.0.gamma_v2l": official.layers[0].tokens_read_gamma,
        "encoder.1.gamma_l2v": official.layers[1].pixels_read_gamma,
        "vis_prompts.weight": official.prompt_tokens,
        "level_encoding.weight": official.level_embedding,
        "encoder.0.vis_self_attn.sampling_offsets.weight": official.layers[0].pixel_attention.sampling_offsets.weight,
        "lang_in_linear.weight": projection,
        "mask_feature.0.weight": official.pixel_head[0].weight,
    }
    leaves = [*features, words, *theirs.values()]
    grads = torch.autograd.grad((logits * arrays["weight"]).sum(), leaves)
    names = [f"feature{i}" for i in range(4)] + ["words"] + [f"pixel_decoder.{name}" for name in theirs]
    for name, grad in zip(names, grads, strict=True):
        expected = arrays[f"grad/{name}"].reshape(grad.shape)
        assert (grad - expected).norm() <= 1e-5 * expected.norm(), name


def layer_and_inputs(batch=2, length=4, dtype=torch.float32):
    layer = CarisLayer(8, num_levels=2, **OPTIONS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    places = sum(h * w for h, w in SHAPES)
    valid = torch.arange(length) < torch.tensor([[length], [2]])[:batch]
    inputs = [torch.randn(batch, places, 8, dtype=dtype), torch.randn(batch, length, 8, dtype=dtype), valid]
    return layer, [*inputs, torch.randn(places, 8, dtype=dtype), torch.rand(batch, places, 2, 2, dtype=dtype)]


def reference_layer(weights):
    """The equations of CarisLayer, one head and one sum at a time."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def ffn(x, name):
        return norm(x + linear(linear(x, f"{name}.linear1").clamp(min=0), f"{name}.linear2"), f"{name}.norm")

    def attend(query, key, value, name, valid=None):
        q, k, v = (linear(x, f"{name}.{part}") for x, part in ((query, "q_proj"), (key, "k_proj"), (value, "v_proj")))
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True):
            scores = torch.einsum("bnd,bpd->bnp", q_h, k_h) / math.sqrt(q_h.shape[-1])
            if valid is not None:
                scores = scores.masked_fill(~valid[:, None], -math.inf)
            heads.append(scores.softmax(-1) @ v_h)
        return linear(torch.cat(heads, -1), f"{name}.out_proj")

    def look_around(query, value, reference, name="pixel_attention"):
        offsets = linear(query, f"{name}.sampling_offsets").unflatten(-1, (2, 2, 2, 2))
        size = torch.tensor([(w, h) for h, w in SHAPES], dtype=query.dtype)
        locations = reference[:, :, None, :, None] + offsets / size[:, None]
        shares = linear(query, f"{name}.attention_weights").unflatten(-1, (2, 4)).softmax(-1).unflatten(-1, (2, 2))
        values = linear(value, f"{name}.value_proj").unflatten(-1, (2, 4))
        return linear(deformable_attention(values, SHAPES, locations, shares), f"{name}.output_proj")

    def layer(pixels, tokens, valid, position, reference):
        seen = attend(tokens, pixels + position, pixels, "tokens_read")
        tokens = norm(tokens + weights["tokens_read_gamma"] * seen, "tokens_read_norm")
        tokens = norm(tokens + attend(tokens, tokens, tokens, "token_attention", valid), "token_attention_norm")
        tokens = ffn(tokens, "token_ffn")
        told = attend(pixels + position, tokens, tokens, "pixels_read", valid)
        pixels = norm(pixels + weights["pixels_read_gamma"] * told, "pixels_read_norm")
        around = look_around(pixels + position, pixels, reference)
        return ffn(norm(pixels + around, "pixel_attention_norm"), "pixel_ffn"), tokens

    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_is_its_equations(dtype):
    layer, inputs = layer_and_inputs()
    layer.to(dtype)
    weights = {name: value.double() for name, value in layer.state_dict().items()}
    reference = reference_layer(weights)
    # Points that fall on another cell's side round differently in float32, so the gradients of locations are compared in float64.
    assert_matches_reference(
        lambda *arguments: layer(*arguments, SHAPES), reference, inputs, dtype=dtype, grad=dtype == torch.float64
    )


def maps(batch=2, dtype=torch.float32):
    sizes = ((12, 16), (6, 8), (3, 4), (2, 2))
    return [torch.randn(batch, channels, *size, dtype=dtype) for channels, size in zip(CHANNELS, sizes, strict=True)]


def small_decoder(**options):
    return CarisDecoder(CHANNELS, 8, **{"num_layers": 2, **OPTIONS, **options})


@given(padding=st.integers(1, 4), integer=st.booleans())
def test_padding_and_the_rest_of_the_batch_do_not_matter(padding, integer):
    decoder = small_decoder().double()
    features, tokens = maps(3, torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    valid = torch.ones(3, 4, dtype=torch.long if integer else torch.bool)
    valid[0, 2:] = 0
    logits = decoder(features, tokens, valid)
    longer = torch.cat([tokens, torch.full((3, padding, 8), float("inf"), dtype=torch.float64)], dim=1)
    longer_valid = torch.cat([valid, valid.new_zeros(3, padding)], dim=1)
    torch.testing.assert_close(decoder(features, longer, longer_valid), logits)
    torch.testing.assert_close(decoder([level[:1] for level in features], tokens[:1, :2]), logits[:1])


def test_a_text_of_padding_only_is_finite_and_says_nothing():
    decoder = small_decoder()
    features, tokens = maps(), torch.randn(2, 4, 8)
    logits = decoder(features, tokens * float("nan"), torch.zeros(2, 4))
    assert logits.isfinite().all()
    torch.testing.assert_close(decoder(features, tokens, torch.zeros(2, 4)), logits)


def test_the_answer_depends_on_the_words_and_on_their_order_only_through_the_first():
    decoder = small_decoder().double()
    features, tokens = maps(dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    logits = decoder(features, tokens)
    assert (decoder(features, tokens.roll(1, 0)) - logits).abs().max() > 1e-4
    later = torch.cat([tokens[:, :1], tokens[:, [3, 1, 4, 2]]], dim=1)
    torch.testing.assert_close(decoder(features, later), logits, msg="the decoder itself knows no positions of words")
    assert (decoder(features, tokens.flip(1)) - logits).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient():
    decoder = small_decoder()
    decoder(maps(), torch.randn(2, 4, 8)).square().sum().backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())


def test_mask_logits_are_float32_and_positions_have_a_row_per_pixel():
    decoder = small_decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(maps(), torch.randn(2, 4, 8)).dtype == torch.float32
    position, centres = decoder._places([*SHAPES, (1, 1)], torch.device("cpu"))
    tables = [sine_position(*shape, 8).flatten(1).T for shape in SHAPES]
    torch.testing.assert_close(
        position[:26], torch.cat([tables[0] + decoder.level_embedding[0], tables[1] + decoder.level_embedding[1]])
    )
    torch.testing.assert_close(centres[1], torch.tensor([0.5, 0.25]))


def test_paper_size_and_initial_values():
    with torch.device("meta"):
        decoder = CarisDecoder((128, 256, 512, 1024))
    # per layer: 3 attentions of 3 (256 -> 1024) and 1024 -> 256, 2 perceptrons, 6 norms, 2 scales, deformable attention
    attention = 3 * (256 * 1024 + 1024) + 1024 * 256 + 256
    perceptron = 256 * 1024 + 1024 + 1024 * 256 + 256
    deformable = 256 * 192 + 192 + 256 * 96 + 96 + 2 * (256 * 256 + 256)
    layer = 3 * attention + 2 * perceptron + 6 * 512 + 2 * 256 + deformable
    pyramid = (128 * 256 + 512) + (9 * 256 * 256 + 512)
    inputs = sum(channels * 256 + 256 + 512 for channels in (256, 512, 1024))
    heads = 6 * (256 * 256 + 256)
    assert sum(p.numel() for p in decoder.parameters()) == 6 * layer + pyramid + inputs + heads + (3 + 5) * 256
    small = CarisDecoder((8, 16, 24, 32), 64, num_layers=1)
    first = small.layers[0]
    assert 0.9 < small.prompt_tokens.std() < 1.1
    assert first.tokens_read_gamma.eq(1).all() and first.pixels_read_gamma.eq(1).all()
    for linear in (first.tokens_read.q_proj, first.pixels_read.out_proj, first.token_ffn.linear1, first.pixel_ffn.linear2):
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    assert first.pixel_attention.sampling_offsets.weight.eq(0).all() and first.pixel_attention.sampling_offsets.bias.any()


def test_compile_export_and_autocast():
    decoder = small_decoder(num_layers=1)
    arguments = (maps(), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))
    logits = decoder(*arguments)
    torch.testing.assert_close(torch.compile(decoder, fullgraph=True, backend="aot_eager")(*arguments), logits)
    torch.testing.assert_close(torch.export.export(decoder, arguments).module()(*arguments), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (decoder(*arguments) - logits).norm() / logits.norm() < 3e-2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CarisDecoder((8, 16, 24), 32), "CarisDecoder: `in_channels` must be four numbers"),
        (lambda: CarisDecoder(CHANNELS, 30), "CarisDecoder: `dim` must be a multiple of 4, got 30"),
        (lambda: small_decoder(num_layers=0), "CarisDecoder: `num_layers` must be at least 1, got 0"),
        (lambda: small_decoder(num_prompts=0), "CarisDecoder: `num_prompts` must be at least 1, got 0"),
        (lambda: small_decoder(attention_dim=33), "CarisLayer: `attention_dim` must be a multiple of num_heads=2, got 33"),
        (lambda: CarisLayer(9, num_heads=2), "CarisLayer: `dim` must be a multiple of num_heads=2, got 9"),
        (lambda: small_decoder()(maps()[:3], torch.randn(2, 4, 8)), "CarisDecoder: `features` must be four maps"),
        (lambda: small_decoder()(maps()[::-1], torch.randn(2, 4, 8)), r"CarisDecoder: `features\[0\]` must be \(B, 4, \*, \*\)"),
        (lambda: small_decoder()(maps(), torch.randn(2, 4, 9)), r"CarisDecoder: `tokens` must be \(B, L, 8\)"),
        (lambda: small_decoder()(maps(), torch.randn(3, 4, 8)), r"CarisDecoder: `tokens` must be \(B, L, 8\) with B=2"),
        (
            lambda: small_decoder()(maps(), torch.randn(2, 4, 8), torch.ones(2, 5)),
            r"CarisDecoder: `valid` must be \(B, L\) with L=4, got \(2, 5\)",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
