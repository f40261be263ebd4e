"""The weights that the golden outputs of InstanceVG's head were made with, under the names of the blocks here."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

TEXT_TO_IMAGE = r"(?:query_generation\.)?T2I_decoder\."
LAYER = r"decoder_transformer\.decoder\.layers\.(\d+)\."
NAMES = (  # official name, our name
    (TEXT_TO_IMAGE + r"layers\.0\.attentions\.1\.attn\.(q|k)_proj\.(\w+)", r"\1_proj.\2"),
    (TEXT_TO_IMAGE + r"layers\.0\.attentions\.1\.attn\.(v|out)_proj\.(\w+)", r"inject.\1_proj.\2"),
    (TEXT_TO_IMAGE + r"layers\.0\.ffns\.0\.layers\.0\.0\.(\w+)", r"inject.ffn.linear1.\1"),
    (TEXT_TO_IMAGE + r"layers\.0\.ffns\.0\.layers\.1\.(\w+)", r"inject.ffn.linear2.\1"),
    (TEXT_TO_IMAGE + r"layers\.0\.norms\.1\.(\w+)", r"inject.attention_norm.\1"),
    (TEXT_TO_IMAGE + r"layers\.0\.norms\.2\.(\w+)", r"inject.ffn.norm.\1"),
    (TEXT_TO_IMAGE + r"post_norm_layer\.(\w+)", r"inject.output_norm.\1"),
    (r"(?:query_generation\.)?mlp\.layers\.(.+)", r"inject.mlp.layers.\1"),
    (r"neck\.fpn1\.(\d)\.(\w+)", r"resize.0.\1.\2"),
    (r"neck\.fpn2\.0\.(\w+)", r"resize.1.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", r"lateral.\1.0.\2"),
    (r"neck\.lateral_convs\.(\d)\.norm_layer\.(\w+)", r"lateral.\1.1.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", r"smooth.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.norm_layer\.(\w+)", r"smooth.\1.1.\2"),
    (LAYER + r"attentions\.0\.attn\.(\w+)\.(\w+)", r"layers.\1.self_attention.\2.\3"),
    (LAYER + r"attentions\.1\.(\w+)\.(\w+)", r"layers.\1.cross_attention.\2.\3"),
    (LAYER + r"ffns\.0\.layers\.0\.0\.(\w+)", r"layers.\1.ffn.linear1.\2"),
    (LAYER + r"ffns\.0\.layers\.1\.(\w+)", r"layers.\1.ffn.linear2.\2"),
    (LAYER + r"norms\.0\.(\w+)", r"layers.\1.self_norm.\2"),
    (LAYER + r"norms\.1\.(\w+)", r"layers.\1.cross_norm.\2"),
    (LAYER + r"norms\.2\.(\w+)", r"layers.\1.ffn.norm.\2"),
    (r"decoder_transformer\.reference_points\.(\w+)", r"prior.shift.\1"),
    (r"query_pos_embedding\.(\w+)", r"prior.position.\1"),
    (r"class_embed\.2\.(\w+)", r"class_head.\1"),
    (r"bbox_embed\.2\.(.+)", r"box_head.mlp.\1"),
    (r"seg_branch\.(.+)", r"\1"),
)


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """The fill rule of the golden data: each parameter follows from its name."""
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("running_var"):
        noise = 1 + 0.1 * np.abs(noise)
    elif len(shape) >= 2:
        noise = noise / np.sqrt(np.prod(shape[1:]))
    else:
        noise = 0.1 * noise + (1 if name.endswith("weight") else 0)
    return torch.from_numpy(noise.astype(np.float32))


def unpacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed input projections taken apart."""
    out = {}
    for name, value in weights.items():
        if ".in_proj_" in name:
            stem, kind = name.split(".in_proj_")
            out |= {f"{stem}.{part}_proj.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        else:
            out[name] = value
    return out


def constant_content(weights: dict[str, Tensor]) -> Tensor:
    """What the official self-attention over zero values and its norm add to every word."""
    own = {re.sub(".*T2I_decoder.layers.0.", "", name): value for name, value in weights.items() if "T2I_decoder.layers.0." in name}
    out = own["attentions.0.attn.out_proj.weight"] @ own["attentions.0.attn.v_proj.bias"] + own["attentions.0.attn.out_proj.bias"]
    return F.layer_norm(out, out.shape, own["norms.0.weight"], own["norms.0.bias"])


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"content": constant_content(weights)}
    for name, value in weights.items():
        for official, ours in NAMES:
            match = re.fullmatch(official, name)
            if match:
                renamed[match.expand(ours)] = value
        unet = re.fullmatch(r"unet_decoder\.(conv|bn)([12])_([234])\.(\w+)", name)
        if unet:
            kind, index, level, rest = unet.groups()
            renamed[f"fuse.{4 - int(level)}.{3 * (int(index) - 1) + (kind == 'bn')}.{rest}"] = value
    return renamed


@pytest.fixture(scope="session")
def instancevg_weights() -> Callable[[str, dict], dict[str, dict[str, Tensor]]]:
    """``instancevg_weights(prefix, arrays)``: official names to values, and ours to values."""

    def build(prefix: str, arrays: dict) -> dict[str, dict[str, Tensor]]:
        official = {}
        names, shapes, sums = (arrays[key] for key in ("param_names", "param_shapes", "param_sum_abs"))
        for name, shape, total in zip(names.tolist(), shapes.tolist(), sums.tolist(), strict=True):
            if "num_batches" in name or "empty_weight" in name:
                continue
            shared = re.sub(r"(class|bbox)_embed\.\d", r"\1_embed.2", name)
            official[name] = filled(prefix + shared, tuple(int(side) for side in re.findall(r"\d+", shape)))
            assert abs(float(official[name].double().abs().sum()) - total) < 1e-6 * total, name
        official = unpacked(official)
        existence = {name.replace("nt_embed", "mlp"): value for name, value in official.items() if name.startswith("nt_embed")}
        return {"official": official, "ours": our_names(official), "existence": existence}

    return build


@pytest.fixture(scope="session")
def load() -> Callable[[torch.nn.Module, dict[str, Tensor]], torch.nn.Module]:
    """Load what a block has of these weights; everything that it has must be among them."""

    def into(block: torch.nn.Module, weights: dict[str, Tensor]) -> torch.nn.Module:
        state = block.state_dict()
        counters = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
        block.load_state_dict({name: weights[name] for name in state if name not in counters} | counters)
        return block.eval()

    return into
