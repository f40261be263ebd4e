"""Weights under the names of public checkpoints, renamed to ours: tables of names, one per part, read in one place.

A row of a table is their name, then ours; a placeholder as ``{leaf}`` stands for each of its values on both sides. The tables name
every parameter of a file, so what is missing and what nobody reads is known before a model is built.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ConvertedWeights", "beit3", "caris", "instancevg"]

PLACEHOLDERS: dict[str, dict[str, str]] = {
    "leaf": {"weight": "weight", "bias": "bias"},
    "branch": {"A": "visual", "B": "text"},  # the two halves of torchscale's multiway modules
    "qkv": {"q": "q", "k": "k", "v": "v"},
    "linear": {"fc1": "fc1", "fc2": "fc2"},
    "ffn": {"fc1": "linear1", "fc2": "linear2"},
    "proj": {name: name for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "deform": {name: name for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")},
    "swin": {name: name for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
    "bert": {
        name: name
        for name in (
            *(f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")),
            *("intermediate.dense", "output.dense", "output.LayerNorm"),
        )
    },
    "embedded": {name: name for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")},
    "level": {name: name for name in "012"},
    "stage": {name: name for name in "0123"},
    "grid": {name: name for name in "01"},
    "conv": {name: name for name in "024"},  # what a Sequential with activations between counts
    "mlp": {"0": "0", "2": "1", "4": "2"},
    "perceptron": {name: name for name in "012"},
    "fuse": {"4": "0", "3": "1", "2": "2"},  # by the level that is joined, by order
    "stat": {name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
}
"""What a placeholder stands for: theirs and ours. ``{layer}`` besides counts from 0 to the part's number of layers."""


@dataclass(frozen=True)
class _Part:
    """Names of one part: prefixes on both sides, rows ``(theirs, ours, ...)``, names of theirs that nothing reads.

    A row with several names of ours splits the tensor along its first axis into that many equal pieces; ``[2:]`` after a name of
    theirs takes the rows from 2 on.
    """

    theirs: str
    ours: str
    rows: tuple[tuple[str, ...], ...]
    unused: tuple[str, ...] = ()
    layers: str = ""

    def filled(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """All rows with the placeholders filled in, for as many layers as ``names`` have."""
        numbered = re.compile(re.escape(self.theirs + self.layers) + r"(\d+)\.")
        found = [int(match[1]) for match in map(numbered.match, names) if match] if self.layers else []
        layers = {str(index): str(index) for index in range(max(found, default=0) + 1)}
        filled: list[tuple[str, ...]] = []
        for row in self.rows:
            keys = list(dict.fromkeys(re.findall(r"{(\w+)}", row[0])))
            for chosen in itertools.product(*((PLACEHOLDERS | {"layer": layers})[key].items() for key in keys)):
                theirs = {key: value for key, (value, _) in zip(keys, chosen, strict=True)}
                ours = {key: value for key, (_, value) in zip(keys, chosen, strict=True)}
                filled.append((self.theirs + row[0].format_map(theirs), *(self.ours + name.format_map(ours) for name in row[1:])))
        return filled

    def ignores(self, name: str) -> bool:
        """Whether a name of theirs is known and read by nothing."""
        return name.startswith(self.theirs) and any(fnmatch.fnmatchcase(name[len(self.theirs) :], p) for p in self.unused)


_BEIT3 = _Part(
    "beit3.",
    "",
    (
        ("text_embed.weight", "text_embedding.weight"),
        ("vision_embed.cls_token", "cls_token"),
        ("vision_embed.proj.{leaf}", "patch_embedding.{leaf}"),
        ("encoder.embed_positions.{branch}.weight[2:]", "{branch}_position"),  # positions count from 2, as in fairseq
        ("encoder.layers.{layer}.self_attn_layer_norm.{branch}.{leaf}", "layers.{layer}.{branch}.attention_norm.{leaf}"),
        ("encoder.layers.{layer}.self_attn.{qkv}_proj.{branch}.{leaf}", "layers.{layer}.{branch}.{qkv}_proj.{leaf}"),
        ("encoder.layers.{layer}.self_attn.inner_attn_ln.{branch}.{leaf}", "layers.{layer}.{branch}.heads_norm.{leaf}"),
        ("encoder.layers.{layer}.self_attn.out_proj.{branch}.{leaf}", "layers.{layer}.{branch}.out_proj.{leaf}"),
        ("encoder.layers.{layer}.final_layer_norm.{branch}.{leaf}", "layers.{layer}.{branch}.ffn_norm.{leaf}"),
        ("encoder.layers.{layer}.ffn.{branch}.{linear}.{leaf}", "layers.{layer}.{branch}.{linear}.{leaf}"),
        ("encoder.layers.{layer}.ffn.{branch}.ffn_layernorm.{leaf}", "layers.{layer}.{branch}.hidden_norm.{leaf}"),
        ("encoder.layer_norm.{branch}.{leaf}", "{branch}_norm.{leaf}"),
    ),
    unused=("vision_embed.mask_token",),  # stands for masked patches in pre-training
    layers="encoder.layers.",
)


def _swin_stage(stage: int) -> _Part:
    """A stage of CARIS' Swin, which merges patches at its end; timm's merges them at the beginning of the next."""
    merging = f"layers_{stage + 1}.downsample"
    rows = [
        ("blocks.{layer}.{swin}.{leaf}", f"layers_{stage}.blocks.{{layer}}.{{swin}}.{{leaf}}"),
        (
            "blocks.{layer}.attn.relative_position_bias_table",
            f"layers_{stage}.blocks.{{layer}}.attn.relative_position_bias_table",
        ),
    ]
    if stage < 3:
        rows += [("downsample.norm.{leaf}", f"{merging}.norm.{{leaf}}")]
        rows += [("downsample.reduction.weight", f"{merging}.reduction.weight")]
    return _Part(
        f"backbone.vis_encoder.layers.{stage}.",
        "image_encoder.body.",
        tuple(rows),
        unused=("blocks.*.attn.relative_position_index",),
        layers="blocks.",
    )


_CARIS = (
    _Part(
        "backbone.vis_encoder.",
        "image_encoder.",
        (
            ("patch_embed.proj.{leaf}", "body.patch_embed.proj.{leaf}"),
            ("patch_embed.norm.{leaf}", "body.patch_embed.norm.{leaf}"),
            ("norm{stage}.{leaf}", "norms.{stage}.{leaf}"),
        ),
    ),
    *(_swin_stage(stage) for stage in range(4)),
    _Part(
        "backbone.lang_encoder.",
        "text_encoder.body.",
        (
            ("embeddings.{embedded}.weight", "embeddings.{embedded}.weight"),
            ("embeddings.LayerNorm.{leaf}", "embeddings.LayerNorm.{leaf}"),
            ("encoder.layer.{layer}.{bert}.{leaf}", "encoder.layer.{layer}.{bert}.{leaf}"),
        ),
        unused=("embeddings.position_ids",),
        layers="encoder.layer.",
    ),
    _Part(
        "backbone.conditional_prompts.",
        "text_encoder.prompts.",
        (
            ("in_linears.{grid}.{leaf}", "projections.{grid}.layers.0.{leaf}"),
            ("out_linears.{grid}.{leaf}", "projections.{grid}.layers.1.{leaf}"),
            ("lang_prompts.weight", "prompt_tokens"),
            ("lang_prompts_norm.{leaf}", "norm.{leaf}"),
        ),
    ),
    _Part(
        "pixel_decoder.lang_in_",
        "text_encoder.",
        (("linear.{leaf}", "projection.{leaf}"), ("norm.{leaf}", "norm.{leaf}")),
    ),
    _Part(
        "pixel_decoder.",
        "decoder.",
        (
            ("input_convs.{level}.conv.{leaf}", "input_projections.{level}.0.{leaf}"),
            ("input_convs.{level}.gn.{leaf}", "input_projections.{level}.1.{leaf}"),
            ("level_encoding.weight", "level_embedding"),
            ("vis_prompts.weight", "prompt_tokens"),
            ("lateral_convs.0.conv.weight", "lateral.0.weight"),
            ("lateral_convs.0.gn.{leaf}", "lateral.1.{leaf}"),
            ("output_convs.0.conv.weight", "smooth.0.weight"),
            ("output_convs.0.gn.{leaf}", "smooth.1.{leaf}"),
            ("mask_feature.{conv}.{leaf}", "pixel_head.{conv}.{leaf}"),
            ("lang_embed.{mlp}.{leaf}", "mask_head.layers.{mlp}.{leaf}"),
            ("encoder.{layer}.v2l_cross_attn.{proj}.{leaf}", "layers.{layer}.tokens_read.{proj}.{leaf}"),
            ("encoder.{layer}.gamma_v2l", "layers.{layer}.tokens_read_gamma"),
            ("encoder.{layer}.l_norm1.{leaf}", "layers.{layer}.tokens_read_norm.{leaf}"),
            ("encoder.{layer}.lang_self_attn.{proj}.{leaf}", "layers.{layer}.token_attention.{proj}.{leaf}"),
            ("encoder.{layer}.l_norm2.{leaf}", "layers.{layer}.token_attention_norm.{leaf}"),
            ("encoder.{layer}.lang_mlp.{ffn}.{leaf}", "layers.{layer}.token_ffn.{ffn}.{leaf}"),
            ("encoder.{layer}.l_norm3.{leaf}", "layers.{layer}.token_ffn.norm.{leaf}"),
            ("encoder.{layer}.l2v_cross_attn.{proj}.{leaf}", "layers.{layer}.pixels_read.{proj}.{leaf}"),
            ("encoder.{layer}.gamma_l2v", "layers.{layer}.pixels_read_gamma"),
            ("encoder.{layer}.v_norm2.{leaf}", "layers.{layer}.pixels_read_norm.{leaf}"),
            ("encoder.{layer}.vis_self_attn.{deform}.{leaf}", "layers.{layer}.pixel_attention.{deform}.{leaf}"),
            ("encoder.{layer}.v_norm1.{leaf}", "layers.{layer}.pixel_attention_norm.{leaf}"),
            ("encoder.{layer}.vis_mlp.{ffn}.{leaf}", "layers.{layer}.pixel_ffn.{ffn}.{leaf}"),
            ("encoder.{layer}.v_norm3.{leaf}", "layers.{layer}.pixel_ffn.norm.{leaf}"),
        ),
        layers="encoder.",
    ),
    _Part("criterion.", "", (), unused=("*",)),  # the loss keeps its class weights among the model's buffers
)


_INSTANCEVG = (
    dataclasses.replace(_BEIT3, theirs="vis_enc.beit3.", ours="encoder."),
    _Part(
        "head.",
        "",
        (
            ("img_embedding.weight", "image_projection.weight"),
            ("lan_embedding.weight", "text_projection.weight"),
            ("neck.fpn1.0.{leaf}", "pyramid.resize.0.0.{leaf}"),
            ("neck.fpn1.1.{leaf}", "pyramid.resize.0.1.{leaf}"),
            ("neck.fpn1.3.{leaf}", "pyramid.resize.0.3.{leaf}"),
            ("neck.fpn2.0.{leaf}", "pyramid.resize.1.{leaf}"),
            ("neck.lateral_convs.{stage}.conv.weight", "pyramid.lateral.{stage}.0.weight"),
            ("neck.lateral_convs.{stage}.norm_layer.{leaf}", "pyramid.lateral.{stage}.1.{leaf}"),
            ("neck.fpn_convs.{stage}.conv.weight", "pyramid.smooth.{stage}.0.weight"),
            ("neck.fpn_convs.{stage}.norm_layer.{leaf}", "pyramid.smooth.{stage}.1.{leaf}"),
            ("unet_decoder.conv1_{fuse}.weight", "unet.fuse.{fuse}.0.weight"),
            ("unet_decoder.bn1_{fuse}.{stat}", "unet.fuse.{fuse}.1.{stat}"),
            ("unet_decoder.conv2_{fuse}.weight", "unet.fuse.{fuse}.3.weight"),
            ("unet_decoder.bn2_{fuse}.{stat}", "unet.fuse.{fuse}.4.{stat}"),
            ("seg_branch.predict.{leaf}", "global_mask_head.predict.{leaf}"),
            ("nt_embed.layers.{perceptron}.{leaf}", "existence_head.mlp.layers.{perceptron}.{leaf}"),
            ("class_embed.2.{leaf}", "instance_head.class_head.{leaf}"),
            ("bbox_embed.2.layers.{perceptron}.{leaf}", "instance_head.box_head.mlp.layers.{perceptron}.{leaf}"),
            ("query_pos_embedding.{leaf}", "decoder.prior.position.{leaf}"),
        ),
        unused=(
            *("query_embedding.weight", "proj_pixel_level_cons.*", "detrloss.*"),
            *("class_embed.[01].*", "bbox_embed.[01].*"),  # further names of the same modules
        ),
    ),
    _Part(
        "head.query_generation.",
        "query_generation.",
        (
            # a self-attention whose values are zero, and its norm, add one vector: _query_content
            ("T2I_decoder.layers.0.attentions.0.attn.in_proj_bias", "content.query", "content.key", "content.value"),
            ("T2I_decoder.layers.0.attentions.0.attn.out_proj.{leaf}", "content.out.{leaf}"),
            ("T2I_decoder.layers.0.norms.0.{leaf}", "content.norm.{leaf}"),
            (
                "T2I_decoder.layers.0.attentions.1.attn.in_proj_{leaf}",
                *("q_proj.{leaf}", "k_proj.{leaf}", "inject.v_proj.{leaf}"),
            ),
            ("T2I_decoder.layers.0.attentions.1.attn.out_proj.{leaf}", "inject.out_proj.{leaf}"),
            ("T2I_decoder.layers.0.norms.1.{leaf}", "inject.attention_norm.{leaf}"),
            ("T2I_decoder.layers.0.ffns.0.layers.0.0.{leaf}", "inject.ffn.linear1.{leaf}"),
            ("T2I_decoder.layers.0.ffns.0.layers.1.{leaf}", "inject.ffn.linear2.{leaf}"),
            ("T2I_decoder.layers.0.norms.2.{leaf}", "inject.ffn.norm.{leaf}"),
            ("T2I_decoder.post_norm_layer.{leaf}", "inject.output_norm.{leaf}"),
            ("mlp.layers.{perceptron}.{leaf}", "inject.mlp.layers.{perceptron}.{leaf}"),
        ),
        unused=("query_embed.weight", "T2I_decoder.layers.0.attentions.0.attn.in_proj_weight"),
    ),
    _Part(
        "head.decoder_transformer.",
        "decoder.",
        (
            ("reference_points.{leaf}", "prior.shift.{leaf}"),
            (
                "decoder.layers.{layer}.attentions.0.attn.in_proj_{leaf}",
                *(f"layers.{{layer}}.self_attention.{name}_proj.{{leaf}}" for name in "qkv"),
            ),
            ("decoder.layers.{layer}.attentions.0.attn.out_proj.{leaf}", "layers.{layer}.self_attention.out_proj.{leaf}"),
            ("decoder.layers.{layer}.attentions.1.{deform}.{leaf}", "layers.{layer}.cross_attention.{deform}.{leaf}"),
            ("decoder.layers.{layer}.ffns.0.layers.0.0.{leaf}", "layers.{layer}.ffn.linear1.{leaf}"),
            ("decoder.layers.{layer}.ffns.0.layers.1.{leaf}", "layers.{layer}.ffn.linear2.{leaf}"),
            ("decoder.layers.{layer}.norms.0.{leaf}", "layers.{layer}.self_norm.{leaf}"),
            ("decoder.layers.{layer}.norms.1.{leaf}", "layers.{layer}.cross_norm.{leaf}"),
            ("decoder.layers.{layer}.norms.2.{leaf}", "layers.{layer}.ffn.norm.{leaf}"),
        ),
        unused=("level_embeds",),
        layers="decoder.layers.",
    ),
)


class ConvertedWeights(dict[str, Tensor]):
    """Our names with their tensors: a state dict that also says what was left over.

    Attributes:
        unused: Names of the file that nothing reads.
        missing: Names that the file should have and has not; only a conversion that is not strict leaves any.
    """

    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def beit3(state_dict: Mapping[str, Any], *, strict: bool = True) -> ConvertedWeights:
    """Weights of a public BEiT-3 file (microsoft/unilm, beit3) under the names of ``Beit3Encoder``.

    Args:
        state_dict: What the file holds, or the parameters under its key ``"model"``, with or without the prefix ``beit3.``. With
            it, parameters that have it not are heads of some task: they count as unused.
        strict: Refuse a file with missing or unknown parameters of the encoder.

    Returns:
        The weights; the position tables without their first two rows, which are never read.

    Raises:
        ValueError: If ``strict`` and a parameter of the encoder is missing or unknown.
        TypeError: If it is no mapping or a parameter is not a tensor.

    Example:
        >>> import torch
        >>> weights = beit3({"beit3.text_embed.weight": torch.zeros(4, 2), "mlm_head.bias": torch.zeros(4)}, strict=False)
        >>> list(weights), weights.unused, weights.missing[0]
        (['text_embedding.weight'], ('mlm_head.bias',), 'beit3.vision_embed.cls_token')
    """
    parameters = _parameters("beit3", state_dict, ("model", "module"))
    prefixed = any(name.startswith(_BEIT3.theirs) for name in parameters)
    part = _BEIT3 if prefixed else dataclasses.replace(_BEIT3, theirs="")
    heads = tuple(name for name in parameters if not name.startswith(part.theirs))
    inside = {name: tensor for name, tensor in parameters.items() if name.startswith(part.theirs)}
    weights = _converted("beit3", inside, (part,), strict)
    weights.unused = (*weights.unused, *heads)
    return weights


def caris(state_dict: Mapping[str, Any], *, strict: bool = True) -> ConvertedWeights:
    """Weights of CARIS' released code (lsa1997/CARIS) under the names of :class:`gresbox.models.Caris`.

    Args:
        state_dict: What the file holds, or the parameters under its key ``"model"``.
        strict: Refuse a file with missing or unknown parameters.

    Returns:
        The weights, with as many blocks and layers as the file has.

    Raises:
        ValueError: If ``strict`` and a parameter is missing or unknown.
        TypeError: If it is no mapping or a parameter is not a tensor.

    Example:
        >>> import torch
        >>> weights = caris({"model": {"pixel_decoder.vis_prompts.weight": torch.zeros(5, 8)}}, strict=False)
        >>> list(weights), weights.missing[0]
        (['decoder.prompt_tokens'], 'backbone.vis_encoder.patch_embed.proj.weight')
    """
    weights = _converted("caris", _parameters("caris", state_dict, ("model",)), _CARIS, strict)
    for name in weights:
        if name.endswith("_gamma"):
            weights[name] = weights[name].flatten()  # theirs have two more axes, of size 1
    return weights


def instancevg(state_dict: Mapping[str, Any], *, strict: bool = True) -> ConvertedWeights:
    """Weights of IGVG's released code (Dmmm1997/InstanceVG, files ``InstanceVG-*.pth``) under the names of IGVG's parts here.

    They fit what that code builds: a BEiT-3 encoder at 320 pixels as ``encoder``, bias-free ``image_projection`` and
    ``text_projection``, ``pyramid``, ``unet``, ``global_mask_head``, ``existence_head`` with two logits, ``query_generation``,
    ``decoder`` with ``PointPrior(reference="shifted")`` and ``instance_head``. Their outputs are those of the released code when
    ``query_generation`` scores words by ``"mean"`` and pools by ``"max"``.

    Args:
        state_dict: What the file holds, or the parameters under its key ``"state_dict"``; a prefix ``module.`` is removed.
        strict: Refuse a file with missing or unknown parameters.

    Returns:
        The weights, with as many layers as the file has; ``unused`` names what the released code builds and never reads, and
        further names of heads that its decoder layers share.

    Raises:
        ValueError: If ``strict`` and a parameter is missing or unknown.
        TypeError: If it is no mapping or a parameter is not a tensor.

    Example:
        >>> import torch
        >>> weights = instancevg({"state_dict": {"module.head.lan_embedding.weight": torch.zeros(8, 16)}}, strict=False)
        >>> list(weights), weights.missing[0]
        (['text_projection.weight'], 'vis_enc.beit3.text_embed.weight')
    """
    weights = _converted("instancevg", _parameters("instancevg", state_dict, ("state_dict",)), _INSTANCEVG, strict)
    content = {name: weights.pop(name) for name in list(weights) if name.startswith("query_generation.content.")}
    if len(content) == 7:
        weights["query_generation.content"] = _query_content(*(content[f"query_generation.content.{n}"] for n in _CONTENT))
    return weights


_CONTENT = ("value", "out.weight", "out.bias", "norm.weight", "norm.bias")


def _query_content(value: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What attention adds that reads only its values' bias, after its norm: the same for every word and picture."""
    return F.layer_norm(F.linear(value, weight, bias), scale.shape, scale, shift)


def _parameters(who: str, state_dict: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters of a file, without the prefix that data-parallel training adds."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{who}: `state_dict` must be a mapping of names to tensors, got {type(state_dict).__name__}.")
    inner: Mapping[str, Any] = next((state_dict[key] for key in keys if isinstance(state_dict.get(key), Mapping)), state_dict)
    wrong = [name for name, value in inner.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"{who}: `state_dict` must hold tensors, got {type(inner[wrong[0]]).__name__} under {wrong[0]!r}.")
    return {name.removeprefix("module."): value for name, value in inner.items()}


def _converted(who: str, parameters: Mapping[str, Tensor], parts: tuple[_Part, ...], strict: bool) -> ConvertedWeights:
    """Rename what the parts' tables name; note the rest."""
    weights, missing, read = ConvertedWeights(), [], set()
    for row, *ours in (filled for part in parts for filled in part.filled(parameters)):
        theirs, _, rows = row.partition("[")
        if theirs not in parameters:
            missing.append(theirs)
            continue
        read.add(theirs)
        tensor = parameters[theirs][int(rows.removesuffix(":]")) :] if rows else parameters[theirs]
        weights.update(zip(ours, tensor.chunk(len(ours)) if len(ours) > 1 else (tensor,), strict=True))
    unread = [name for name in parameters if name not in read]
    unknown = [name for name in unread if not any(part.ignores(name) for part in parts)]
    if strict and (missing or unknown):
        problems = [*_listed("missing", missing), *_listed("unknown", unknown)]
        raise ValueError(f"{who}: `state_dict` must hold exactly the parameters of that model, got {'; '.join(problems)}.")
    weights.unused, weights.missing = tuple(unread), tuple(missing)
    return weights


def check_fits(who: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that weights have the names and shapes of a module's own.

    Raises:
        ValueError: If one is missing, unexpected or of another shape.
    """
    both = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    problems = [
        *_listed("missing", [name for name in own if name not in weights]),
        *_listed("unexpected", [name for name in weights if name not in own]),
        *_listed("of another shape", [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in both]),
    ]
    if problems:
        raise ValueError(f"{who}: `state_dict` must hold exactly this model's parameters, got {'; '.join(problems)}.")


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"{len(names)} {what} ({shown})"]
