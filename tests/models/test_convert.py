"""Weights of released checkpoints under our names: every parameter accounted for, and the released code's outputs reproduced."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from gresbox.blocks import (
    AttentionGuidedQueryGeneration,
    DeformableDecoder,
    ExistenceHead,
    GlobalMaskHead,
    InstanceHead,
    PointPrior,
    ScoreTextSelector,
    SimpleFeaturePyramid,
    UNetDecoder,
)
from gresbox.models import convert
from gresbox.models.beit3 import BEIT3_BASE, BEIT3_LARGE, Beit3Config, Beit3Encoder

NARROW = Beit3Config(dim=48, num_layers=2, num_heads=4, ffn_dim=64, patch_size=4, vocab_size=30, text_positions=1022)


class Parts(nn.Module):
    """IGVG's parts as the released code builds them, under the names that the conversion gives them."""

    def __init__(self, config: Beit3Config, image_size: int) -> None:
        super().__init__()
        self.encoder = Beit3Encoder(config, image_size=image_size)
        self.image_projection = nn.Conv2d(config.dim, 256, 1, bias=False)
        self.text_projection = nn.Linear(config.dim, 256, bias=False)
        self.pyramid = SimpleFeaturePyramid(256)
        selector = functools.partial(ScoreTextSelector, score="mean")
        self.query_generation = AttentionGuidedQueryGeneration(256, 10, text_selector=selector, pooling="max")
        self.decoder = DeformableDecoder(prior=PointPrior(256, reference="shifted"))
        self.unet = UNetDecoder()
        self.global_mask_head, self.existence_head = GlobalMaskHead(256), ExistenceHead(256)
        self.instance_head = InstanceHead(256)

    def head(self, visual, tokens, valid):
        features, words = self.image_projection(visual), self.text_projection(tokens)
        levels = self.pyramid(features)
        generated = self.query_generation(words, features, valid)
        steps, reference = self.decoder(generated.queries, generated.points, levels)
        pixels = self.unet(levels)
        *_, last = self.instance_head(steps, pixels, words, valid, points=generated.points, reference=reference)
        return generated, steps, reference, last, self.global_mask_head(pixels), self.existence_head(pixels)


def released_head(arrays, dim: int, *, device: str = "meta") -> dict[str, torch.Tensor]:
    """Names and shapes of the released head for an encoder of width ``dim``; the golden head's is 48."""
    weights = {}
    for name, text in zip(arrays["param_names"].tolist(), arrays["param_shapes"].tolist(), strict=True):
        shape = tuple(dim if int(size) == 48 else int(size) for size in text.strip("()").split(",") if size.strip())
        dtype = torch.long if name.endswith("num_batches_tracked") else torch.float32
        weights["head." + name] = torch.zeros(shape, dtype=dtype, device=device)
    return weights


def released_encoder(config: Beit3Config, side: int, *, device: str = "meta") -> dict[str, torch.Tensor]:
    """Names and shapes of the released encoder: each of ours under theirs, and what only theirs has."""
    with torch.device("meta"):
        own = Beit3Encoder(config, image_size=side * config.patch_size).state_dict()
    part = dataclasses.replace(convert._BEIT3, theirs="vis_enc.beit3.")
    layers = [f"vis_enc.beit3.encoder.layers.{config.num_layers - 1}.x"]
    weights = {}
    for theirs, ours in part.filled(layers):
        rows = 2 if theirs.endswith("[2:]") else 0
        shape = own[ours].shape
        weights[theirs.removesuffix("[2:]")] = torch.zeros((shape[0] + rows, *shape[1:]), device=device)
    return weights | {"vis_enc.beit3.vision_embed.mask_token": torch.zeros(1, 1, config.dim, device=device)}


def filled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Noise seeded by each name, as the golden data of the head were made."""
    for name, tensor in weights.items():
        if tensor.dtype == torch.long or name.endswith("empty_weight"):
            continue
        noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            noise = 1 + 0.1 * np.abs(noise)
        elif noise.ndim >= 2:
            noise = noise / np.sqrt(np.prod(tensor.shape[1:]))
        else:
            noise = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        weights[name] = torch.from_numpy(noise.astype(np.float32))
    return weights


@pytest.fixture(scope="module")
def head_arrays(golden):
    return golden("igvg_head")


@pytest.fixture(scope="module")
def released(head_arrays):
    return filled(released_head(head_arrays, 48, device="cpu") | released_encoder(NARROW, 6, device="cpu"))


@pytest.fixture(scope="module")
def parts(released):
    model = Parts(NARROW, 24).eval()
    model.load_state_dict(convert.instancevg({"state_dict": released, "epoch": 10}))
    return model


def test_the_golden_parameters_are_what_they_were(released, head_arrays):
    shared = {f"{kind}_embed.{alias}." for kind in ("class", "bbox") for alias in "01"}  # filled as number 2, which is the same
    for name, total in zip(head_arrays["param_names"].tolist(), head_arrays["param_sum_abs"], strict=True):
        if not name.endswith(("num_batches_tracked", "empty_weight")) and not name.startswith(tuple(shared)):
            assert released["head." + name].double().abs().sum().item() == pytest.approx(total, rel=1e-6), name


def test_the_released_heads_outputs_come_out_of_our_parts(parts, head_arrays):
    arrays = {name: torch.from_numpy(array) for name, array in head_arrays.items() if not name.startswith("param_")}
    tokens, valid = arrays["text_feat"], 1 - arrays["pad_mask"]
    with torch.no_grad():
        generated, steps, reference, last, merged, existence = parts.head(arrays["img_feat"], tokens, valid)
    close = functools.partial(torch.testing.assert_close, atol=5e-5, rtol=1e-4)
    close(generated.minimap, arrays["attn_global"], atol=1e-6)
    close(generated.points, arrays["points_xy"], atol=1e-6)
    close(generated.queries, arrays["q_init"])
    close(torch.stack(steps), arrays["hs"])
    close(reference, arrays["init_ref"])
    close(last.boxes, arrays["out_pred_bbox"])
    close(last.score_logits.sigmoid(), arrays["out_pred_class"].softmax(-1)[..., 0])
    close(existence, arrays["out_nt_label"])
    size = tuple(arrays["img_hw"].tolist())
    resize = functools.partial(nn.functional.interpolate, size=size, mode="bilinear", align_corners=True)
    close(resize(merged[:, None]), arrays["out_pred_global_mask"], atol=2e-4)
    close(resize(last.masks), arrays["out_pred_mask"], atol=5e-4)  # logits of up to a hundred


@pytest.mark.parametrize("config", [BEIT3_BASE, BEIT3_LARGE], ids=["base", "large"])
def test_released_files_of_both_sizes_fit_to_the_last_parameter(config, head_arrays):
    head = released_head(head_arrays, config.dim)
    weights = convert.instancevg(head | released_encoder(config, 20))
    with torch.device("meta"):
        own = Parts(config, 320).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: tensor.shape for name, tensor in own.items()}
    assert weights.missing == ()
    parameters = {name: tensor for name, tensor in head.items() if not name.endswith(("_mean", "_var", "_tracked", "empty_weight"))}
    aliases = (
        sum(t.numel() for name, t in parameters.items() if name.startswith(("head.class_embed.", "head.bbox_embed."))) // 3 * 2
    )
    if config is BEIT3_BASE:
        assert round((sum(t.numel() for t in parameters.values()) - aliases) / 1e6, 2) == 13.19, "as the released head has"


def test_what_nobody_reads_is_reported(released):
    weights = convert.instancevg(released)
    dead = {name for name in weights.unused if not name.startswith(("head.class_embed.", "head.bbox_embed."))}
    assert dead == {
        "vis_enc.beit3.vision_embed.mask_token",
        "head.query_embedding.weight",
        "head.query_generation.query_embed.weight",
        "head.query_generation.T2I_decoder.layers.0.attentions.0.attn.in_proj_weight",
        "head.decoder_transformer.level_embeds",
        "head.detrloss.criterion.empty_weight",
        *(f"head.proj_pixel_level_cons.{name}" for name in ("vis.weight", "vis.bias", "txt.weight", "txt.bias")),
    }
    aliases = set(weights.unused) - dead
    assert len(aliases) == 16 and all(name.split(".")[2] in "01" for name in aliases)


def test_prefixes_of_training_are_removed(released):
    plain = convert.instancevg(released)
    wrapped = convert.instancevg({"state_dict": {"module." + name: tensor for name, tensor in released.items()}, "lr": 5e-4})
    assert plain.keys() == wrapped.keys() and all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_packed_projections_are_split_in_order(released):
    weights = convert.instancevg(released)
    packed = released["head.decoder_transformer.decoder.layers.1.attentions.0.attn.in_proj_weight"]
    rows = [weights[f"decoder.layers.1.self_attention.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(rows), packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("head.seg_branch.predict.bias"), r"got 1 missing \(head\.seg_branch\.predict\.bias\)\.$"),
        (lambda f: f.pop("head.query_generation.T2I_decoder.layers.0.norms.0.bias"), r"got 1 missing \(head\.query_generation"),
        (lambda f: f.pop("vis_enc.beit3.encoder.layers.0.ffn.B.fc1.weight"), r"got 1 missing \(vis_enc\.beit3"),
        (lambda f: f.pop("head.unet_decoder.bn2_3.running_var"), r"got 1 missing \(head\.unet_decoder"),
        (lambda f: f.update({"head.aux_head.weight": torch.zeros(2)}), r"got 1 unknown \(head\.aux_head\.weight\)\.$"),
        (lambda f: f.update({"lan_enc.weight": torch.zeros(2)}), r"got 1 unknown \(lan_enc\.weight\)\.$"),
        (lambda f: f.update({"vis_enc.beit3.pooler.weight": torch.zeros(2)}), r"got 1 unknown"),
        (lambda f: f.clear(), r"missing \(vis_enc\.beit3\.text_embed\.weight, .* more\)\.$"),
    ],
)
def test_files_that_are_not_complete_or_not_known_are_refused(change, message, released):
    file = dict(released)
    change(file)
    with pytest.raises(ValueError, match=r"^instancevg: `state_dict` must hold exactly the parameters of that model, ") as caught:
        convert.instancevg(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        convert.instancevg(file)


def test_a_conversion_that_is_not_strict_says_what_is_missing(released):
    file = dict(released)
    del file["head.query_generation.T2I_decoder.layers.0.norms.0.bias"], file["head.seg_branch.predict.bias"]
    file["head.aux_head.weight"] = torch.zeros(2)
    weights = convert.instancevg(file, strict=False)
    assert set(weights.missing) == set(released) - set(file)
    assert "head.aux_head.weight" in weights.unused
    lost = convert.instancevg(released).keys() - weights.keys()
    assert lost == {"query_generation.content", "global_mask_head.predict.bias"}


@pytest.mark.parametrize("name", ["beit3", "instancevg"])
def test_a_file_of_something_else(name):
    with pytest.raises(TypeError, match=rf"^{name}: `state_dict` must hold tensors, got str under 'author'\.$"):
        getattr(convert, name)({"author": "nobody"})
    with pytest.raises(TypeError, match=rf"^{name}: `state_dict` must be a mapping of names to tensors, got list\.$"):
        getattr(convert, name)([torch.zeros(2)])


def test_beit3_counts_heads_as_unused_and_takes_names_without_prefix():
    file = {name.removeprefix("vis_enc."): tensor for name, tensor in released_encoder(NARROW, 6).items()}
    with_heads = convert.beit3({"model": file | {"mlm_head.weight": torch.zeros(3)}})
    bare = convert.beit3({name.removeprefix("beit3."): tensor for name, tensor in file.items()})
    assert with_heads.unused == ("beit3.vision_embed.mask_token", "mlm_head.weight")
    assert bare.keys() == with_heads.keys() and bare.unused == ("vision_embed.mask_token",)
    with pytest.raises(ValueError, match=r"^beit3: .* got 1 unknown \(head\.weight\)\.$"):
        convert.beit3({name.removeprefix("beit3."): t for name, t in file.items()} | {"head.weight": torch.zeros(3)})
