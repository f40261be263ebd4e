"""IGVG as it was released: names, shapes, outputs and losses of that code, its recipe, and the sizes of the paper's model."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gresbox.models import IGVG, Beit3Config, convert, create_model, preset_config
from gresbox.models.igvg import RELEASED
from gresbox.structures import GresTarget
from gresbox.training.optimizers import make_optimizer
from gresbox.training.schedule import learning_rate_factor

SMALL = Beit3Config(dim=48, num_layers=2, num_heads=4, ffn_dim=64, patch_size=4, vocab_size=30, text_positions=1022, drop_path=0.0)


def target(count, size):
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    for index in range(count):
        masks[index, 8 * index : 8 * index + 12, 4 : 4 + 9 * (index + 1)] = True
    return GresTarget(masks)


def test_the_recipe_is_the_released_codes():
    with torch.device("meta"):
        model = create_model("igvg_beit3_base")
    groups = {group["name"]: group for group in model.parameter_groups(model.recipe.lr)}
    where = {id(parameter): name for name, group in groups.items() for parameter in group["params"]}
    assert sorted(where) == sorted(id(parameter) for parameter in model.parameters()), "each parameter once"
    for name, parameter in model.named_parameters():
        assert where[id(parameter)].startswith("backbone") == name.startswith("encoder."), name
    rates = {name.removesuffix("_no_decay"): group["lr"] for name, group in groups.items()}
    assert rates == {"main": 5e-4, "backbone": pytest.approx(5e-5)} and {group["weight_decay"] for group in groups.values()} == {
        0.0
    }
    recipe = model.recipe
    assert (recipe.optimizer, recipe.betas, recipe.eps, recipe.amsgrad) == ("adam", (0.9, 0.98), 1e-9, True)
    assert (recipe.schedule, recipe.epochs, recipe.batch, recipe.clip, recipe.image_size) == ("step", 10, 16, 0.15, 320)
    assert [round(learning_rate_factor(recipe, step, 100), 6) for step in (0, 59, 60, 99)] == [1, 1, 0.1, 0.1]
    trained = create_model("igvg_tiny", recipe=dataclasses.replace(recipe, image_size=64))
    optimizer = make_optimizer(trained.recipe, trained.parameter_groups(trained.recipe.lr))
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["amsgrad"]


def filled(name, shape):
    """Noise seeded by the name, as the golden data of the head were made."""
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("running_var"):
        noise = 1 + 0.1 * np.abs(noise)
    elif noise.ndim >= 2:
        noise = noise / np.sqrt(np.prod(shape[1:]))
    else:
        noise = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return torch.from_numpy(noise.astype(np.float32))


def released_file(arrays, config, side, *, device="cpu"):
    """A file of the released code: the head's names and shapes as they were recorded at width 48, the encoder's from our own."""
    file = {}
    for name, text in zip(arrays["param_names"].tolist(), arrays["param_shapes"].tolist(), strict=True):
        shape = tuple(config.dim if int(size) == 48 else int(size) for size in text.strip("()").split(",") if size.strip())
        if name.endswith(("num_batches_tracked", "empty_weight")):
            file["head." + name] = torch.zeros(shape, dtype=torch.long if "tracked" in name else torch.float32, device=device)
        else:
            file["head." + name] = torch.empty(shape, device=device) if device == "meta" else filled("head." + name, shape)
    with torch.device("meta"):
        model = IGVG(dataclasses.replace(preset_config("igvg_beit3_base"), encoder=config, image_size=side * config.patch_size))
    own = {name.removeprefix("encoder."): value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    for theirs, ours in convert._BEIT3.filled([f"beit3.encoder.layers.{config.num_layers - 1}.x"]):
        rows = 2 if theirs.endswith("[2:]") else 0
        shape = (own[ours].shape[0] + rows, *own[ours].shape[1:])
        file["vis_enc." + theirs.removesuffix("[2:]")] = torch.randn(shape, device=device) * 0.1
    return file | {"vis_enc.beit3.vision_embed.mask_token": torch.zeros(1, 1, config.dim, device=device)}


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("igvg_head")


def released_model(**overrides):
    config = preset_config("igvg_beit3_base")
    return IGVG(dataclasses.replace(config, **{"encoder": SMALL, "image_size": 24, **RELEASED, **overrides})).eval()


@pytest.fixture(scope="module")
def released(arrays):
    torch.manual_seed(0)
    model = released_model()
    model.load_released({"state_dict": released_file(arrays, SMALL, 6), "epoch": 10})
    return model


def test_the_released_heads_outputs_and_losses_come_out_of_the_whole_model(released, arrays, monkeypatch):
    at = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiu"}
    valid = 1 - at["pad_mask"]
    monkeypatch.setattr(released, "encode", lambda *_: (at["img_feat"], at["text_feat"], valid.bool()))
    output = released(torch.zeros(2, 3, 24, 24), torch.zeros(2, 20, dtype=torch.long), valid)
    size = tuple(at["img_hw"].tolist())
    torch.testing.assert_close(output.boxes, at["out_pred_bbox"], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(output.points, at["points_xy"])
    torch.testing.assert_close(
        output.instances.score_logits.sigmoid(), at["out_pred_class"].softmax(-1)[..., 0], atol=5e-5, rtol=1e-4
    )
    torch.testing.assert_close(output.extras["existence"], at["out_nt_label"], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(output.extras["minimap"], at["attn_global"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(output.resized(size)[:, None], at["out_pred_global_mask"], atol=2e-4, rtol=1e-4)
    assert output.align_corners and len(output.aux) == 2
    masks = F.interpolate(output.instances.masks, size=size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(masks, at["out_pred_mask"], atol=5e-4, rtol=1e-4)
    boxes = at["gt_boxes0_xyxy_px"] / size[0]
    cxcywh = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1)
    truth = [GresTarget(at["gt_parts0"].bool(), cxcywh, merged=at["gt_global"][0].bool()), target(0, 32)]
    losses = released.criterion()(output, truth)
    mask = sum(loss for name, loss in losses.items() if name.endswith(("bce", "dice")))
    expected = {"mask": at["total_loss_mask"], "det": at["total_loss_det"], "existence": at["total_loss_label_nt"]}
    got = {"mask": mask, "det": losses["cls"] + losses["box"] + losses["giou"], "existence": losses["existence"]}
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-4)


@pytest.mark.parametrize("name", ["igvg_beit3_base", "igvg_beit3_large"])
def test_released_files_of_both_sizes_fit_to_the_last_parameter(name, arrays):
    with torch.device("meta"):
        model = create_model(name, **RELEASED)
        file = released_file(arrays, model.config.encoder, 20, device="meta")
    converted = convert.instancevg(file)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in model.state_dict().items()}
    if name == "igvg_beit3_base":
        count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("encoder."))
        unused = 768 * 256 + 10 * 256 + 4 * 256 + (128 * 256 + 128) + (129 * 256 + 129)  # built there and read by nothing
        folded = 4 * 256 * 256 + 4 * 256 + 2 * 256 - 256  # self-attention over zeros and its norm, here one vector
        assert round((count + unused + folded) / 1e6, 2) == 13.19, "as the released head has"


def test_released_weights_are_loaded_or_refused_whole(released, arrays):
    file = released_file(arrays, SMALL, 6)
    larger = released_model(image_size=48)
    larger.load_released(file)
    assert larger.encoder.visual_position.shape == (145, 48), "resized to the larger grid"
    before = {name: value.clone() for name, value in released.state_dict().items()}
    del file["head.seg_branch.predict.bias"]
    with pytest.raises(ValueError, match=r"instancevg: .* 1 missing \(head\.seg_branch\.predict\.bias\)"):
        released.load_released(file)
    with pytest.raises(ValueError, match=r"IGVG\.load_released: .* of another shape \(query_generation\.inject\.ffn\.linear1"):
        released_model(attention_ffn_dim=64).load_released(released_file(arrays, SMALL, 6))
    message = r"IGVG\.load_released: `config\.text_score` must be 'mean', as in the released code, got 'l2'; create_model\(name, "
    with pytest.raises(ValueError, match=message) as caught:
        released_model(text_score="l2").load_released(file)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in released.state_dict().items())


def test_pretrained_reads_weights_and_tokenizer_from_a_path_or_a_url(tmp_path, monkeypatch, arrays):
    from gresbox.models import igvg

    file = {name.removeprefix("vis_enc."): v for name, v in released_file(arrays, SMALL, 6).items() if name.startswith("vis_enc.")}
    torch.save({"model": file}, tmp_path / "beit3.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(igvg, "beit3_tokenizer", lambda path: ("tokenizer of", path.name))
    places = [str(tmp_path / "beit3.pth"), (tmp_path / "beit3.pth").as_uri()]
    for place in places:
        config = dataclasses.replace(preset_config("igvg_beit3_base"), encoder=SMALL, image_size=24, pretrained=place)
        model = IGVG(dataclasses.replace(config, tokenizer=str(tmp_path / "beit3.spm")), pretrained=True)
        assert torch.equal(model.encoder.text_embedding.weight, file["beit3.text_embed.weight"])
        assert model.processor.tokenizer == ("tokenizer of", "beit3.spm")
    assert (tmp_path / "hub" / "checkpoints" / "beit3.pth").is_file(), "fetched once"
    assert not torch.equal(IGVG(config).encoder.text_embedding.weight, file["beit3.text_embed.weight"])
    with pytest.raises(RuntimeError, match="`tokenizer` must be set"):
        IGVG(config).predict(torch.zeros(3, 20, 20, dtype=torch.uint8), "a dog")


@pytest.mark.slow
def test_igvg_beit3_base_trains_every_parameter_at_320_pixels():
    model = create_model("igvg_beit3_base")
    known = {
        "encoder": 220_987_392 - (1 + 2 + 2) * 768 + (400 - 196) * 768,  # the public file's, without mask token and two rows each
        "text_projection": 768 * 256,
        "global_mask_head": 257,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert {name: counts[name] for name in known} == known
    ids, valid = torch.randint(4, 60_000, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    images = torch.randn(1, 3, 320, 320)
    for count in (2, 0):
        model.zero_grad(set_to_none=True)
        output = model(images, ids, valid)
        assert output.merged.shape == (1, 80, 80) and output.extras["minimap"].shape == (1, 20, 20) and len(output.aux) == 2
        model.criterion()(output, [target(count, 320)])["loss"].backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []
