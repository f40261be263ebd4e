"""The BEiT-3 encoder: equal to the public implementation, to a reference in float64, and to itself under padding and order."""

from __future__ import annotations

import dataclasses
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn import functional as F

from gresbox.models import convert
from gresbox.models.beit3 import (
    BEIT3_BASE,
    BEIT3_LARGE,
    Beit3Config,
    Beit3Encoder,
    resize_position,
)
from gresbox.testing import relative_error

SMALL = Beit3Config(dim=24, num_layers=2, num_heads=3, ffn_dim=40, patch_size=4, vocab_size=30, text_positions=12, drop_path=0.0)


def small(**options) -> Beit3Encoder:
    torch.manual_seed(3)
    return Beit3Encoder(dataclasses.replace(SMALL, **options), image_size=16)


def inputs(batch=2, height=16, width=16, length=6, dtype=torch.float64):
    images = torch.randn(batch, 3, height, width, dtype=dtype)
    valid = torch.arange(length) < torch.arange(length, length - batch, -1)[:, None]  # the first text is the longest
    return images, torch.randint(0, 30, (batch, length)), valid


def golden_weights(arrays, prefix="beit3."):
    """The parameters by the rule that golden data of this kind are filled with: noise seeded by each name."""
    weights = {}
    for name, shape in zip(arrays["param_names"].tolist(), arrays["param_shapes"].tolist(), strict=True):
        sizes = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
        noise = np.random.RandomState(zlib.crc32((prefix + name).encode()) & 0x7FFFFFFF).standard_normal(sizes)
        if noise.ndim >= 2:
            noise = noise / np.sqrt(np.prod(sizes[1:]))
        else:
            noise = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        weights[prefix + name] = torch.from_numpy(noise.astype(np.float32))
    return weights


def test_weights_under_the_public_names_give_the_public_models_outputs(golden):
    arrays = golden("igvg_beit3_tiny")
    weights = golden_weights(arrays)
    for (name, tensor), total in zip(weights.items(), arrays["param_sum_abs"], strict=True):
        assert tensor.double().abs().sum().item() == pytest.approx(total, rel=1e-6), name
    config = Beit3Config(dim=24, num_layers=2, num_heads=3, ffn_dim=96, patch_size=8, vocab_size=40)
    encoder = Beit3Encoder(config, image_size=32).eval()
    encoder.load_beit3({"model": weights | {"mlm_head.weight": torch.zeros(40, 24)}})
    image, ids = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["tokens"])
    valid = 1 - torch.from_numpy(arrays["pad_mask"])
    states, tokens = encoder.encode(image, ids, valid)
    expected = torch.from_numpy(arrays["encoder_out"])
    torch.testing.assert_close(torch.cat([states, tokens], dim=1), expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(states[:, 0], torch.from_numpy(arrays["cls"]), atol=5e-6, rtol=1e-5)
    visual, tokens = encoder(image, ids, valid)
    assert visual.shape == (2, 24, 4, 4)
    torch.testing.assert_close(visual.flatten(2).transpose(1, 2), torch.from_numpy(arrays["img"]), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(tokens, torch.from_numpy(arrays["txt"]), atol=5e-6, rtol=1e-5)


def reference(weights, images, ids, valid, *, heads, layers):
    """One sequence, the weights of each position picked by its modality, attention written out."""
    height, width = images.shape[-2] // SMALL.patch_size, images.shape[-1] // SMALL.patch_size
    patches = images.unfold(2, SMALL.patch_size, SMALL.patch_size).unfold(3, SMALL.patch_size, SMALL.patch_size)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(images), height * width, -1)
    picture = flat @ weights["patch_embedding.weight"].flatten(1).T + weights["patch_embedding.bias"]
    picture = torch.cat([weights["cls_token"].expand(len(images), 1, -1), picture], 1) + weights["visual_position"]
    words = weights["text_embedding.weight"][ids] + weights["text_position"][: ids.shape[1]]
    x = torch.cat([picture, words * valid[..., None]], dim=1)
    split, dim = picture.shape[1], x.shape[-1]
    hidden_from = torch.cat([torch.zeros(len(x), split, dtype=torch.bool), ~valid], dim=1)

    def each(name, x, apply):
        parts = zip(("visual", "text"), (x[:, :split], x[:, split:]), strict=True)
        return torch.cat([apply(part, *(weights[name.format(m) + leaf] for leaf in (".weight", ".bias"))) for m, part in parts], 1)

    def linear(name, x):
        return each(name, x, lambda x, w, b: x @ w.T + b)

    def norm(name, x):
        def apply(x, w, b):
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

        return each(name, x, apply)

    for index in range(layers):
        at = f"layers.{index}." + "{}."
        y = norm(at + "attention_norm", x)
        q, k, v = (linear(at + f"{part}_proj", y).unflatten(-1, (heads, -1)) for part in "qkv")
        scores = torch.einsum("bihd,bjhd->bhij", q * (dim // heads) ** -0.5, k)
        scores = scores.masked_fill(hidden_from[:, None, None], -torch.inf)
        read = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + linear(at + "out_proj", norm(at + "heads_norm", read))
        hidden = linear(at + "fc1", norm(at + "ffn_norm", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(at + "fc2", norm(at + "hidden_norm", hidden))
    x = norm("{}_norm", x)
    return x[:, 1:split].transpose(1, 2).unflatten(-1, (height, width)), x[:, split:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_a_reference_in_float64(dtype):
    encoder = small().to(dtype)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and norms too: none may stay at a value that hides a mistake
            parameter.add_(torch.randn_like(parameter) * 0.2)
    weights = {name: p.detach().double().requires_grad_() for name, p in encoder.named_parameters()}
    images, ids, valid = inputs()
    visual, tokens = encoder(images.to(dtype), ids, valid)
    expected = reference(weights, images.to(dtype).double(), ids, valid, heads=3, layers=2)
    limit = 1e-10 if dtype == torch.float64 else 2e-5
    assert relative_error(visual, expected[0]) < limit and relative_error(tokens, expected[1]) < limit
    one, two = torch.randn_like(visual), torch.randn_like(tokens)
    ((visual * one).sum() + (tokens * two).sum()).backward()
    ((expected[0] * one.double()).sum() + (expected[1] * two.double()).sum()).backward()
    scale = torch.cat([w.grad.flatten() for w in weights.values()]).norm()
    for name, parameter in encoder.named_parameters():
        error = (parameter.grad.double() - weights[name].grad).norm() / (weights[name].grad.norm() + 1e-3 * scale)
        assert error < 10 * limit, name


@given(length=st.integers(1, 6), extra=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(length, extra, seed):
    encoder = small().double().eval()
    torch.manual_seed(seed)
    images, ids, _ = inputs(length=length)
    padded = torch.cat([ids, torch.randint(0, 30, (2, extra))], dim=1)
    valid = torch.arange(length + extra).expand(2, -1) < length
    with torch.no_grad():
        visual, tokens = encoder(images, ids)
        padded_visual, padded_tokens = encoder(images, padded, valid)
    torch.testing.assert_close(padded_visual, visual)
    torch.testing.assert_close(padded_tokens[:, :length], tokens)
    assert padded_tokens.isfinite().all()


@given(seed=st.integers(0, 99))
def test_samples_do_not_see_each_other(seed):
    encoder = small().double().eval()
    torch.manual_seed(seed)
    images, ids, valid = inputs(batch=4)
    order = torch.randperm(4)
    with torch.no_grad():
        visual, tokens = encoder(images, ids, valid)
        for mine, whole in zip(encoder(images[order], ids[order], valid[order].int()), (visual, tokens), strict=True):
            torch.testing.assert_close(mine, whole[order])
        alone = encoder(images[:1], ids[:1], valid[:1])
    torch.testing.assert_close(alone, (visual[:1], tokens[:1]))


def test_both_modalities_read_each_other():
    encoder = small().double().eval()
    images, ids, valid = inputs()
    visual, tokens = encoder(images, ids, valid)
    other_visual, _ = encoder(images, (ids + 1) % 30, valid)
    _, other_tokens = encoder(images + 1, ids, valid)
    assert (visual - other_visual).abs().amax((0, 1)).min() > 1e-6, "every patch reads the text"
    assert (tokens - other_tokens).abs().amax((0, 2)).min() > 1e-6, "every token reads the picture"


def test_a_text_that_is_all_padding_is_finite():
    encoder = small()
    images, ids, _ = inputs(dtype=torch.float32)
    visual, tokens = encoder(images, ids, torch.zeros(2, 6))
    (visual.sum() + tokens.sum()).backward()
    assert visual.isfinite().all() and tokens.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    changed, _ = encoder(images, (ids + 1) % 30, torch.zeros(2, 6))
    torch.testing.assert_close(changed, visual)


@pytest.mark.parametrize("options", [{}, {"num_layers": 1}, {"drop_path": 0.5}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("final_text", [True, False])
def test_every_parameter_gets_a_gradient(options, final_text):
    encoder = small(final_text=final_text, **options).train()
    images, ids, valid = inputs(dtype=torch.float32)
    visual, tokens = encoder(images, ids, valid)
    loss = visual.square().sum()
    if final_text:
        loss = loss + tokens.square().sum()
    loss.backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_without_the_final_text_side_the_patches_are_the_same():
    whole, lean = small().eval(), small(final_text=False).eval()
    lost = whole.state_dict().keys() - lean.state_dict().keys()
    assert lost == {"text_norm.weight", "text_norm.bias"} | {
        f"layers.1.text.{module}.{leaf}"
        for module in ("q_proj", "out_proj", "heads_norm", "ffn_norm", "fc1", "fc2", "hidden_norm")
        for leaf in ("weight", "bias")
    }
    lean.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name not in lost})
    batch = inputs(dtype=torch.float32)
    torch.testing.assert_close(lean(*batch)[0], whole(*batch)[0])
    assert lean(*batch)[1].shape == (2, 6, 24)


def test_checkpointing_gives_the_same_gradients_also_with_drop_path():
    batch = inputs(dtype=torch.float32)
    grads = []
    for gradient_checkpointing in (False, True):
        encoder = small(drop_path=0.5, gradient_checkpointing=gradient_checkpointing).train()
        torch.manual_seed(1)
        sum(out.square().sum() for out in encoder(*batch)).backward()
        grads.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("silent", ["fc2", "out_proj"])
def test_drop_path_drops_a_sample_in_both_modalities_and_scales_the_others(silent):
    layer = small(drop_path=0.75).layers[1].double()
    assert layer.drop_path == 0.75 and small(drop_path=0.75).layers[0].drop_path == 0
    for branch in (layer.visual, layer.text):
        torch.nn.init.zeros_(getattr(branch, silent).weight)  # leaves one of the two updates alone
    visual, text = torch.randn(64, 5, 24, dtype=torch.float64), torch.randn(64, 3, 24, dtype=torch.float64)
    layer.eval()
    full = [after - before for after, before in zip(layer(visual, text, None), (visual, text), strict=True)]
    layer.train()
    kept = []
    for after, before, update in zip(layer(visual, text, None), (visual, text), full, strict=True):
        ratio = ((after - before) * update).sum((1, 2)) / update.square().sum((1, 2))
        torch.testing.assert_close(after - before, update * ratio[:, None, None])
        torch.testing.assert_close(ratio, torch.where(ratio > 2, 4.0, 0.0).double())
        kept.append(ratio > 2)
    assert torch.equal(kept[0], kept[1]) and 4 < kept[0].sum() < 40


@given(height=st.integers(1, 6), width=st.integers(1, 6))
def test_pictures_of_another_size_resize_the_position_table(height, width):
    encoder = small().double().eval()
    images, ids, valid = inputs(height=4 * height, width=4 * width)
    resized = resize_position(encoder.visual_position, (4, 4), (height, width))
    assert torch.equal(resized[0], encoder.visual_position[0])
    grid = encoder.visual_position[1:].T.reshape(1, 24, 4, 4)
    expected = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[1:], expected.permute(0, 2, 3, 1).reshape(height * width, 24))
    visual, _ = encoder(images, ids, valid)
    weights = dict(encoder.named_parameters()) | {"visual_position": resized}
    torch.testing.assert_close(visual, reference(weights, images, ids, valid, heads=3, layers=2)[0])


def test_resizing_keeps_a_constant_table_and_its_own_size():
    table = torch.randn(1 + 14 * 14, 5)
    assert resize_position(table, (14, 14), (14, 14)) is table
    constant = resize_position(table[:1].expand(197, -1), (14, 14), (20, 20))
    torch.testing.assert_close(constant, table[:1].expand(401, -1))
    with pytest.raises(ValueError, match=r"resize_position: `table` must be \(197, C\), got \(200, 5\)"):
        resize_position(torch.zeros(200, 5), (14, 14), (20, 20))


def public_names(config: Beit3Config, side: int, *, prefix="beit3.", device="meta") -> dict[str, torch.Tensor]:
    """Names and shapes of a public BEiT-3 file, written out from the layout of microsoft/unilm and torchscale."""
    dim, ffn = config.dim, config.ffn_dim
    shapes = {
        "text_embed.weight": (config.vocab_size, dim),
        "vision_embed.mask_token": (1, 1, dim),
        "vision_embed.cls_token": (1, 1, dim),
        "vision_embed.proj.weight": (dim, 3, config.patch_size, config.patch_size),
        "vision_embed.proj.bias": (dim,),
        "encoder.embed_positions.A.weight": (side * side + 3, dim),
        "encoder.embed_positions.B.weight": (1024, dim),
    }
    for branch in "AB":
        for index in range(config.num_layers):
            at = f"encoder.layers.{index}."
            for name in "kvq":
                shapes |= {
                    f"{at}self_attn.{name}_proj.{branch}.weight": (dim, dim),
                    f"{at}self_attn.{name}_proj.{branch}.bias": (dim,),
                }
            shapes |= {f"{at}self_attn.out_proj.{branch}.weight": (dim, dim), f"{at}self_attn.out_proj.{branch}.bias": (dim,)}
            for norm in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                shapes |= {f"{at}{norm}.{branch}.{leaf}": (dim,) for leaf in ("weight", "bias")}
            at += f"ffn.{branch}."
            shapes |= {
                f"{at}fc1.weight": (ffn, dim),
                f"{at}fc1.bias": (ffn,),
                f"{at}fc2.weight": (dim, ffn),
                f"{at}fc2.bias": (dim,),
            }
            shapes |= {f"{at}ffn_layernorm.{leaf}": (ffn,) for leaf in ("weight", "bias")}
        shapes |= {f"encoder.layer_norm.{branch}.{leaf}": (dim,) for leaf in ("weight", "bias")}
    torch.manual_seed(0)
    return {prefix + name: torch.randn(shape, device=device) for name, shape in shapes.items()}


@pytest.mark.parametrize(("config", "millions"), [(BEIT3_BASE, 222), (BEIT3_LARGE, 674)], ids=["base", "large"])
def test_public_files_of_both_sizes_fit_to_the_last_parameter(config, millions):
    file = public_names(config, 14)
    with torch.device("meta"):
        encoder = Beit3Encoder(config, image_size=224)
    weights = convert.beit3({"model": file})
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in encoder.state_dict().items()}
    assert weights.unused == ("beit3.vision_embed.mask_token",) and weights.missing == ()
    ours, theirs = (sum(t.numel() for t in state.values()) for state in (weights, file))
    assert theirs - ours == (1 + 2 + 2) * config.dim, "the mask token and two rows of each position table"
    assert round(theirs / 1e6) in (millions, millions - 1), "the size that the public models' table states, rounded"


def test_the_golden_names_are_those_of_a_public_file(golden):
    arrays = golden("igvg_beit3_tiny")
    config = Beit3Config(dim=24, num_layers=2, num_heads=3, ffn_dim=96, patch_size=8, vocab_size=40)
    assert set(arrays["param_names"].tolist()) == set(public_names(config, 4, prefix=""))


@pytest.mark.parametrize("prefix", ["beit3.", "", "module.beit3."])
def test_loading_resizes_the_position_table_and_cuts_the_texts(prefix):
    encoder = small()
    file = public_names(SMALL, 3, prefix=prefix, device="cpu")
    encoder.load_beit3(file)
    table = file[prefix + "encoder.embed_positions.A.weight"]
    torch.testing.assert_close(encoder.visual_position, resize_position(table[2:], (3, 3), (4, 4)), msg="rows 0 and 1 are not read")
    assert torch.equal(encoder.text_position, file[prefix + "encoder.embed_positions.B.weight"][2:14])
    assert torch.equal(encoder.layers[1].text.v_proj.bias, file[prefix + "encoder.layers.1.self_attn.v_proj.B.bias"])
    lean = small(final_text=False)
    lean.load_beit3(file)
    assert torch.equal(lean.layers[1].text.k_proj.weight, encoder.layers[1].text.k_proj.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("beit3.encoder.layers.1.ffn.A.fc1.bias"), r"1 missing \(beit3\.encoder\.layers\.1\.ffn\.A\.fc1\.bias\)"),
        (lambda f: f.update({"beit3.pooler.weight": torch.zeros(2)}), r"1 unknown \(beit3\.pooler\.weight\)"),
        (
            lambda f: f.update({"beit3.text_embed.weight": torch.zeros(31, 24)}),
            r"1 of another shape \(text_embedding\.weight \(31, 24\) for",
        ),
        (
            lambda f: f.update({"beit3.encoder.embed_positions.A.weight": torch.zeros(13, 24)}),
            r"of another shape \(visual_position",
        ),
        (
            lambda f: f.update({"beit3.encoder.embed_positions.B.weight": torch.zeros(9, 24)}),
            r"of another shape \(text_position \(7",
        ),
        (lambda f: f.clear(), "missing"),
    ],
    ids=["missing", "unknown", "vocabulary", "no-square", "short-text", "empty"],
)
def test_a_file_that_does_not_fit_is_refused_whole(change, message):
    encoder, file = small(), public_names(SMALL, 4, device="cpu")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    change(file)
    with pytest.raises(ValueError, match=message) as caught:
        encoder.load_beit3(file)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_deeper_or_shallower_files_are_refused():
    deep = public_names(dataclasses.replace(SMALL, num_layers=3), 4, device="cpu")
    with pytest.raises(ValueError, match=r"Beit3Encoder\.load_beit3: .* 40 unexpected \(layers\.2\."):
        small().load_beit3(deep)
    with pytest.raises(ValueError, match=r"40 missing \(layers\.2\."):
        small(num_layers=3).load_beit3(public_names(SMALL, 4, device="cpu"))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"dim": 25}, ValueError, "`dim` must be a multiple of num_heads=3, got 25."),
        ({"num_layers": 0}, ValueError, "`num_layers` must be at least 1, got 0."),
        ({"patch_size": 4.0}, TypeError, "`patch_size` must be a whole number, got 4.0."),
        ({"vocab_size": True}, TypeError, "`vocab_size` must be a whole number, got True."),
        ({"stem": "conv", "patch_size": 6}, ValueError, "`patch_size` must be a power of two with stem='conv', got 6."),
        ({"stem": "conv"}, ValueError, "`dim` must be a multiple of 16 with stem='conv', got 24."),
        ({"start_std": -1.0}, ValueError, "`start_std` must be at least 0, got -1.0."),
        ({"update_scale": -1.0}, ValueError, "`update_scale` must be at least 0, got -1.0."),
        ({"drop_path": 1.0}, ValueError, "`drop_path` must be in [0, 1), got 1.0."),
        ({"drop_path": float("nan")}, ValueError, "`drop_path` must be in [0, 1), got nan."),
    ],
)
def test_wrong_numbers_in_a_config(override, error, message):
    with pytest.raises(error, match=r"^Beit3Config: ") as caught:
        dataclasses.replace(SMALL, **override)
    assert str(caught.value) == f"Beit3Config: {message}"


@pytest.mark.parametrize(
    ("images", "ids", "valid", "error", "message"),
    [
        (
            torch.zeros(2, 3, 18, 16),
            torch.ones(2, 5).long(),
            None,
            ValueError,
            "`images` must be (B, 3, H, W) with H and W multiples of 4",
        ),
        (torch.zeros(2, 3, 0, 16), torch.ones(2, 5).long(), None, ValueError, "multiples of 4, got (2, 3, 0, 16)."),
        (torch.zeros(2, 1, 16, 16), torch.ones(2, 5).long(), None, ValueError, "`images` must be (B, 3, H, W)"),
        (torch.zeros(2, 3, 16, 16), torch.ones(3, 5).long(), None, ValueError, "`input_ids` must be (B, L) with B=2, got (3, 5)."),
        (
            torch.zeros(2, 3, 16, 16),
            torch.ones(2, 13).long(),
            None,
            ValueError,
            "`input_ids` must be at most 12 tokens long, got 13.",
        ),
        (torch.zeros(2, 3, 16, 16), torch.ones(2, 5), None, TypeError, "`input_ids` must be whole numbers, got torch.float32."),
        (
            torch.zeros(2, 3, 16, 16),
            torch.ones(2, 5).long(),
            torch.ones(2, 4),
            ValueError,
            "`valid` must be (B, L) with L=5, got (2, 4).",
        ),
        (torch.zeros(2, 3, 16, 16).byte(), torch.ones(2, 5).long(), None, TypeError, "`images` must be a floating-point tensor"),
        ("picture", torch.ones(2, 5).long(), None, TypeError, "`images` must be a tensor, got str."),
    ],
)
def test_inputs_that_do_not_fit(images, ids, valid, error, message):
    with pytest.raises(error, match=r"^Beit3Encoder: ") as caught:
        small()(images, ids, valid)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("image_size", [0, 3, 18])
def test_the_image_size_is_a_multiple_of_the_patch(image_size):
    with pytest.raises(ValueError, match=f"`image_size` must be a multiple of patch_size=4, got {image_size}"):
        Beit3Encoder(SMALL, image_size=image_size)


def test_autocast_and_export():
    encoder = small().eval()
    images, ids, valid = inputs(dtype=torch.float32)
    whole = encoder(images, ids, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(images, ids, valid)
    assert all(relative_error(low, full) < 3e-2 for low, full in zip(half, whole, strict=True))
    exported = torch.export.export(encoder, (images, ids, valid)).module()
    torch.testing.assert_close(exported(images, ids, valid), whole)


@pytest.mark.parametrize(
    ("option", "part"), [({"dim": 48, "stem": "conv"}, "patch_embedding"), ({"word_fusion": True}, "word_fusion")]
)
def test_public_weights_do_not_fit_what_they_do_not_have(option, part):
    encoder = small(**option)
    with pytest.raises(ValueError, match=rf"Beit3Encoder\.load_beit3: .* missing \({part}\."):
        encoder.load_beit3(public_names(encoder.config, 4, device="cpu"))
