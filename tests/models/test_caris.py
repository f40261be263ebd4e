"""CARIS: the composition, its released weights, its recipe, and the commands."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from gresbox import cli
from gresbox.losses import CarisCriterion
from gresbox.models import Caris, PromptedTextEncoder, TextEncoderConfig, convert, create_model, load_model, preset_config
from gresbox.structures import GresTarget
from gresbox.training.schedule import learning_rate_factor

TEXTS = ["the red circle", "all squares on the left of the dog", "a dog"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("caris_tiny").eval()


def picture(height=50, width=70):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def targets(counts, size=64):
    made = []
    for count in counts:
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for index in range(count):
            masks[index, 8 * index : 8 * index + 12, 4 : 4 + 9 * (index + 1)] = True
        made.append(GresTarget(masks))
    return made


def same(parts, others):
    return all(torch.equal(tensor, others[name]) for name, tensor in parts.items()) and parts.keys() == others.keys()


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)], ids=["mixed", "all-empty"])
@pytest.mark.parametrize("switch", [{}, {"num_layers": 1, "prompt_grids": (3,), "num_prompts": 1}], ids=["preset", "smallest"])
def test_every_parameter_gets_a_gradient(counts, switch):
    model = create_model("caris_tiny", **switch)
    losses = model.criterion()(model(**model.processor([picture()] * 3, TEXTS)), targets(counts))
    losses["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_output_encode_and_criterion(tiny):
    batch = tiny.processor([picture()] * 3, TEXTS)
    output = tiny(**batch)
    assert output.merged.shape == (3, 16, 16) and output.merged.dtype == torch.float32
    assert (output.no_target, output.instances, output.aux, output.align_corners) == (None, None, (), True)
    visual, tokens, valid = tiny.encode(**batch)
    assert (visual.shape[1], tokens.shape[2]) == tiny.encode_dims == (128, 96)
    assert tokens.shape[:2] == valid.shape == batch["input_ids"].shape and valid.dtype == torch.bool
    features = tiny.image_encoder(batch["images"])
    torch.testing.assert_close(tiny.decoder(features, tiny.text_encoder.project(tokens), valid), output.merged)
    criterion = tiny.criterion(reduction="sample")
    assert isinstance(criterion, CarisCriterion) and criterion.class_weights == (0.9, 1.1) and criterion.reduction == "sample"


def test_words_read_the_picture_and_padding_is_not_read(tiny):
    one, other = picture(), 255 - picture()
    (_, seen, _), (_, changed, _) = (tiny.encode(**tiny.processor([image], ["the dog"])) for image in (one, other))
    assert (seen - changed).abs().max() > 1e-3
    alone = tiny(**tiny.processor([one], ["the dog"])).merged
    together = tiny(**tiny.processor([one, other], ["the dog", "all the large red squares on the left"])).merged
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_the_text_encoder_is_bert_on_words_and_prompts():
    numbers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = PromptedTextEncoder(TextEncoderConfig("bert", numbers), 8, visual_dim=12, vocab_size=30).double().eval()
    ids, valid = torch.randint(0, 30, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    visual = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    body = encoder.body
    # Without prompts this is the plain model, with them it is the plain model's layers on the longer sequence.
    plain = body(input_ids=ids, attention_mask=valid).last_hidden_state
    torch.testing.assert_close(encoder.encode(ids, valid), plain)
    states = torch.cat([body.embeddings(input_ids=ids), encoder.prompts(visual)], 1)
    blocked = torch.cat([valid == 0, torch.zeros(2, 5, dtype=torch.bool)], 1)[:, None, None]
    body.set_attn_implementation("eager")
    for layer in body.encoder.layer:
        states = layer(states, torch.zeros(2, 1, 1, 10, dtype=torch.float64).masked_fill(blocked, -1e9))
    expected = encoder.norm(encoder.projection(states[:, :5]))
    body.set_attn_implementation("sdpa")
    got = encoder(ids, valid, visual)
    torch.testing.assert_close(got[valid.bool()], expected[valid.bool()])
    with pytest.raises(ValueError, match=r"PromptedTextEncoder: `visual` must be \(B, \*, \*, \*\) with B=2"):
        encoder(ids, valid, visual[:1])


def test_predict_says_nothing_with_an_empty_mask(tiny):
    answers = tiny.predict([picture(40, 60), picture(30, 20)], ["the dog", "all cats"])
    assert [tuple(answer.mask.shape) for answer in answers] == [(40, 60), (30, 20)]
    assert all(answer.no_target_prob is None and len(answer.scores) == 0 for answer in answers)
    batch = tiny.processor([picture(40, 60)], ["the dog"])
    output = tiny(**batch)
    pair = torch.stack([torch.zeros_like(output.merged), output.merged], dim=1)
    official = nn.functional.interpolate(pair, (40, 60), mode="bilinear", align_corners=True).argmax(1).bool()
    assert torch.equal(answers[0].mask, official[0]), "the released code's arg max of two logits after resizing them"
    empty = dataclasses.replace(output, merged=torch.full_like(output.merged, -1.0))
    assert not tiny.postprocess(empty, [(40, 60)])[0].mask.any()


def test_saving_and_loading_give_the_same_bits(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert isinstance(again, Caris) and again.config == tiny.config and not again.training
    assert same(tiny.state_dict(), again.state_dict())
    batch = again.processor([picture()], ["the two dogs"])
    with torch.no_grad():
        assert torch.equal(tiny(**batch).merged, again(**batch).merged)


def test_a_swapped_decoder_is_named_and_asked_for(tmp_path):
    class Product(nn.Module):
        def forward(self, features, tokens, valid=None):
            return torch.einsum("bchw,bc->bhw", features[0], tokens[:, 0, :32])

    model = create_model("caris_tiny")
    model.decoder = Product()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved with parts of its own, give them: decoder=.*Product\(\.\.\.\)"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), decoder=Product())(**model.processor([picture()], ["a dog"])).merged.shape == (1, 16, 16)


def test_parameter_groups_follow_the_released_code():
    model = create_model("caris_tiny")
    groups = {group["name"]: group for group in model.parameter_groups(1.0, backbone_lr_scale=0.1)}
    named = {id(parameter): name for name, group in groups.items() for parameter in group["params"]}
    where = {name: named[id(parameter)] for name, parameter in model.named_parameters()}
    assert where["decoder.prompt_tokens"] == where["text_encoder.prompts.prompt_tokens"] == "main_no_decay"
    assert where["decoder.layers.0.tokens_read_gamma"] == where["decoder.level_embedding"] == "main_no_decay"
    assert where["text_encoder.prompts.norm.weight"] == where["decoder.lateral.1.weight"] == "main_no_decay"
    assert where["text_encoder.prompts.projections.0.layers.0.weight"] == where["decoder.mask_head.layers.0.weight"] == "main"
    assert where["text_encoder.body.encoder.layer.0.output.dense.weight"] == "backbone"
    assert where["text_encoder.body.embeddings.position_embeddings.weight"] == "backbone_no_decay"
    assert groups["main"]["weight_decay"] == 0.01 and groups["backbone"]["lr"] == 0.1


def test_the_recipe_is_the_released_codes(golden):
    recipe = preset_config("caris_swin_base").recipe
    numbers = dataclasses.asdict(recipe)
    numbers = {name: numbers[name] for name in ("schedule", "lr", "epochs", "batch", "clip", "amp", "weight_decay", "warmup")}
    assert list(numbers.values()) == ["poly", 1e-4, 50, 16, 1.0, "fp16", 0.01, 1500]
    arrays = golden("aml_official_lr")
    total, warmup = int(arrays["total_iters"]), int(arrays["warmup_iters"])
    short = dataclasses.replace(recipe, power=float(arrays["power"]), warmup=warmup)
    ours = [short.lr * learning_rate_factor(short, step, total) for step in range(total + 1)]
    # After the warm-up the rates are equal. In it, theirs rises to the full rate and then drops to the curve, ours rises to the
    # curve; and their first step takes the full rate.
    assert ours[warmup + 1 :] == pytest.approx(arrays["lr"][warmup + 1 :, 0].tolist(), rel=1e-12, abs=1e-18)
    assert ours[:warmup] == sorted(ours[:warmup]) and arrays["lr"][0, 0] == recipe.lr
    longest = max(abs(a - b) for a, b in zip(ours[1:], arrays["lr"][1:, 0], strict=True))
    assert longest < 0.2 * recipe.lr, "at a warm-up of a fifth of the training; the released one is a thirtieth"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"image_encoder": "swin"}, "`image_encoder` must be a ImageEncoderConfig, got 'swin'"),
        ({"num_heads": 0}, "`num_heads` must be at least 1, got 0"),
        ({"num_layers": 1.5}, "`num_layers` must be a whole number, got 1.5"),
        ({"max_tokens": 2}, "`max_tokens` must be at least 3, got 2"),
        ({"vocabulary": "red"}, "`vocabulary` must be words, got str"),
        ({"dim": 30}, "`dim` must be a multiple of 4, got 30"),
        ({"attention_dim": 30}, "`attention_dim` must be a multiple of num_heads=4, got 30"),
        ({"prompt_grids": 2}, "`prompt_grids` must be a tuple, got 2"),
        ({"class_weights": 1.1}, "`class_weights` must be a tuple, got 1.1"),
    ],
)
def test_a_wrong_number_in_a_config_is_one_line(override, message):
    with pytest.raises((TypeError, ValueError), match=r"^CarisConfig: ") as caught:
        create_model("caris_tiny", **override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shapes_and_types_of_inputs_are_checked(tiny):
    batch = tiny.processor([picture()], ["a dog"])
    with pytest.raises(ValueError, match=r"Caris: `attention_mask` must be \(B, L\) with L=4, got \(1, 5\)"):
        tiny(**{**batch, "attention_mask": torch.ones(1, 5)})
    with pytest.raises(TypeError, match="Caris: `images` must be a floating-point tensor"):
        tiny(**{**batch, "images": batch["images"].byte()})


@pytest.mark.slow
def test_compile_gives_the_same_masks(tiny):
    batch = tiny.processor([picture()] * 2, TEXTS[:2])
    with torch.no_grad():
        compiled = torch.compile(tiny, backend="eager")
        torch.testing.assert_close(compiled(**batch).merged, tiny(**batch).merged)


def test_the_commands_train_evaluate_and_predict(tmp_path, capsys):
    out, image = tmp_path / "run", tmp_path / "photo.png"
    sizes = ["--train-size", "64", "--val-size", "6", "--batch", "4", "--pictures", "2"]
    command = ["train", "--model", "caris_tiny", "--data", "synthetic", "--max-steps", "30", "--out", str(out)]
    assert cli.main([*command, *sizes, "--log-every", "5", "--cpu", "--quiet"]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    assert json.loads((out / "metrics.json").read_text())["steps"] == 30
    assert {"pictures.png", "loss_curve.png", "model.safetensors"} <= {item.name for item in out.iterdir()}
    options = ["--data", "synthetic", "--split", "val", "--size", "6", "--cpu", "--quiet"]
    assert cli.main(["evaluate", "--checkpoint", str(out), *options]) == 0
    from PIL import Image

    Image.effect_noise((90, 60), 50).convert("RGB").save(image)
    overlay = tmp_path / "overlay.png"
    command = ["predict", "--checkpoint", str(out), "--image", str(image), "--text", "the red circle", "--cpu"]
    assert cli.main([*command, "--out", str(overlay)]) == 0 and overlay.is_file()
    printed = capsys.readouterr().out
    assert "gIoU" in printed and "% of the picture" in printed and "probability" not in printed


# The released code's names, written down from lsa1997/CARIS independently of the converter's tables.
def released_names(depths, layers, bert_layers):
    both = ("weight", "bias")
    swin, bert, decoder = "backbone.vis_encoder.", "backbone.lang_encoder.", "pixel_decoder."
    names = [f"{swin}patch_embed.{part}.{leaf}" for part in ("proj", "norm") for leaf in both]
    for stage, depth in enumerate(depths):
        block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for index in range(depth):
            here = f"{swin}layers.{stage}.blocks.{index}."
            names += [f"{here}{part}.{leaf}" for part in block for leaf in both]
            names += [f"{here}attn.relative_position_bias_table", f"{here}attn.relative_position_index"]
        if stage < 3:
            names += [f"{swin}layers.{stage}.downsample.{name}" for name in ("reduction.weight", "norm.weight", "norm.bias")]
        names += [f"{swin}norm{stage}.{leaf}" for leaf in both]
    names += [f"{bert}embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    names += [f"{bert}embeddings.LayerNorm.{leaf}" for leaf in both]
    for index in range(bert_layers):
        parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
        parts += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
        names += [f"{bert}encoder.layer.{index}.{part}.{leaf}" for part in parts for leaf in both]
    prompts = "backbone.conditional_prompts."
    names += [f"{prompts}{side}_linears.{grid}.{leaf}" for side in ("in", "out") for grid in (0, 1) for leaf in both]
    names += [f"{prompts}lang_prompts.weight", *(f"{prompts}lang_prompts_norm.{leaf}" for leaf in both)]
    names += [f"{decoder}{part}.weight" for part in ("level_encoding", "vis_prompts")]
    names += [f"{decoder}lang_in_{part}.{leaf}" for part in ("linear", "norm") for leaf in both]
    names += [f"{decoder}input_convs.{level}.{part}.{leaf}" for level in range(3) for part in ("conv", "gn") for leaf in both]
    for conv in ("lateral_convs", "output_convs"):
        names += [f"{decoder}{conv}.0.{name}" for name in ("conv.weight", "gn.weight", "gn.bias")]
    names += [f"{decoder}{part}.{place}.{leaf}" for part in ("mask_feature", "lang_embed") for place in (0, 2, 4) for leaf in both]
    for index in range(layers):
        here = f"{decoder}encoder.{index}."
        deformable = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        parts = [f"vis_self_attn.{part}" for part in deformable]
        attentions = ("v2l_cross_attn", "l2v_cross_attn", "lang_self_attn")
        parts += [f"{part}.{side}_proj" for part in attentions for side in ("q", "k", "v", "out")]
        parts += [f"{side}_mlp.fc{number}" for side in ("vis", "lang") for number in (1, 2)]
        parts += [f"{side}_norm{number}" for side in ("v", "l") for number in (1, 2, 3)]
        names += [f"{here}{part}.{leaf}" for part in parts for leaf in both] + [f"{here}gamma_v2l", f"{here}gamma_l2v"]
    return [*names, "criterion.seg_criterion.weight"]


def small_swin(**overrides):
    config = preset_config("caris_swin_base")
    swin = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
    bert = {**preset_config("caris_tiny").text_encoder.options, "vocab_size": 30, "num_hidden_layers": 3}
    numbers = {"image_size": 224, "dim": 16, "num_layers": 2, "ffn_dim": 32, "attention_dim": 64}
    return Caris(
        dataclasses.replace(
            config,
            image_encoder=dataclasses.replace(config.image_encoder, options=swin),
            text_encoder=dataclasses.replace(config.text_encoder, options=bert),
            **{**numbers, **overrides},
        )
    )


def released_file(model, names):
    """A file of the released code with that model's weights: each name's tensor is found by what the conversion makes of it."""
    own = model.state_dict()
    marked = {name: torch.full((3, 1), float(index)) for index, name in enumerate(names)}
    made = convert.caris({name: value for name, value in marked.items() if "criterion" not in name})
    return {names[int(value.flatten()[0])]: own[name] for name, value in made.items()}


def test_the_converter_names_every_parameter_of_the_released_model():
    model = small_swin()
    names = released_names((2, 2, 2, 2), 2, 3)
    state = {name: torch.zeros(1) for name in names}
    weights = convert.caris({"model": state, "epoch": 49})
    assert weights.keys() == model.state_dict().keys()
    left = [name for name in names if "relative_position_index" in name or name.startswith("criterion.")]
    assert sorted(weights.unused) == sorted(left) and weights.missing == ()
    paper = released_names((2, 2, 18, 2), 6, 12)
    assert len(convert.caris(dict.fromkeys(paper, torch.zeros(1)))) == len(paper) - 24 - 1


def test_swin_stages_are_renamed_as_timm_renames_them():
    import timm
    from timm.models.swin_transformer import checkpoint_filter_fn

    model, names = small_swin(), released_names((2, 2, 2, 2), 2, 3)
    classifier = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **model.config.image_encoder.options)
    swin = "backbone.vis_encoder."
    file = {name.removeprefix(swin): value for name, value in released_file(model, names).items() if name.startswith(swin)}
    renamed = checkpoint_filter_fn({name: value for name, value in file.items() if name[:4] != "norm"}, classifier)
    ours = {name.removeprefix("image_encoder."): value for name, value in model.state_dict().items()}
    assert len(renamed) == 2 * 2 + 8 * 13 + 3 * 3
    for name, value in renamed.items():  # timm's feature extractor writes layers_0 where its classifier writes layers.0
        assert value is not None and torch.equal(value, ours[f"body.{name.replace('layers.', 'layers_')}"]), name
    assert all(torch.equal(file[f"norm{i}.weight"], ours[f"norms.{i}.weight"]) for i in range(4))


def test_released_weights_are_loaded_or_refused_whole():
    source, model = small_swin(), small_swin()
    state = released_file(source, released_names((2, 2, 2, 2), 2, 3))
    shaped = {name: value.view(1, 1, -1) if "gamma" in name else value for name, value in state.items()}
    model.load_released({"model": {f"module.{name}": value for name, value in shaped.items()}})
    assert same(source.state_dict(), model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lost = dict(shaped)
    del lost["pixel_decoder.vis_prompts.weight"]
    for wrong, message in (
        (lost, r"caris: `state_dict` must hold exactly .* 1 missing \(pixel_decoder.vis_prompts.weight\)"),
        ({**shaped, "text_proj.weight": torch.zeros(1)}, r"1 unknown \(text_proj.weight\)"),
        ({**shaped, "pixel_decoder.vis_prompts.weight": torch.zeros(5, 8)}, r"decoder.prompt_tokens \(5, 8\) for \(5, 16\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model.load_released(wrong)
        assert "\n" not in str(caught.value) and same(before, model.state_dict())
    with pytest.raises(TypeError, match=r"must hold tensors, got str under 'pixel_decoder.vis_prompts.weight'"):
        model.load_released({"pixel_decoder.vis_prompts.weight": "no tensor"})


def test_a_model_of_the_released_form_trains_with_swin_and_bert():
    model = small_swin(image_size=224)
    images, ids, valid = torch.randn(1, 3, 224, 224), torch.randint(4, 30, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    model.criterion()(model(images, ids, valid), targets((0,), 224))["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.slow
def test_caris_swin_base_trains_every_parameter_at_448_pixels():
    model = create_model("caris_swin_base")
    known = {
        "image_encoder": 86_743_224 - 2_048 + 3_840,  # Swin-B of window 7 without head, its last norm replaced by one per stage
        "text_encoder": 108_891_648
        + 2_755_584
        + 5 * 768
        + 2 * 768
        + 768 * 256
        + 256
        + 2 * 256,  # BERT without pooler, prompts, projection
        "decoder": 27_977_664,  # summed up in tests/blocks/test_caris_decoder.py
    }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()} == known
    ids, valid = torch.randint(4, 30_000, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    images = torch.randn(1, 3, 448, 448)
    for count in (1, 0):
        model.zero_grad(set_to_none=True)
        output = model(images, ids, valid)
        assert output.merged.shape == (1, 112, 112)
        model.criterion()(output, targets((count,), 448))["loss"].backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert without == []
