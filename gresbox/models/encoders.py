"""Image encoders from timm and text encoders from transformers, described by plain numbers so that they build offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gresbox._checks import check_shape

__all__ = ["ImageEncoder", "ImageEncoderConfig", "TextEncoder", "TextEncoderConfig"]


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Which timm model serves as image encoder.

    Args:
        name: timm's model name, with the weights tag that ``pretrained=True`` fetches.
        options: Further arguments of ``timm.create_model`` (explicit sizes of a custom model, drop path rate).
        fixed_size: The model must be told its input size (window attention models).
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed_size: bool = False


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which transformers model serves as text encoder.

    Args:
        kind: transformers' model type, for example ``"roberta"`` or ``"bert"``.
        options: Arguments of that type's configuration class, as explicit numbers.
        pretrained: Hub id of the weights and the tokenizer that ``pretrained=True`` fetches; empty: there are none.
        dropout: Dropout after the projection to the model's width.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pretrained: str = ""
    dropout: float = 0.1


class ImageEncoder(nn.Module):
    """Four feature maps of a timm model, each with a LayerNorm of its own.

    The norms follow Mask2Former's backbones, which put one on every output stage; timm's feature extractors have none.

    Args:
        config: The timm model.
        image_size: Side of the square input, in pixels.
        pretrained: Fetch timm's weights (the only time that this class uses the network).

    Shape:
        - ``images``: ``(B, 3, H, W)``; returns four ``(B, C_i, H / s, W / s)`` with strides s = 4, 8, 16, 32.

    Raises:
        ValueError: If the timm model has no stages at strides 4, 8, 16 and 32.

    Example:
        >>> import torch
        >>> config = ImageEncoderConfig("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)})
        >>> encoder = ImageEncoder(config, image_size=64)
        >>> [tuple(level.shape) for level in encoder(torch.zeros(1, 3, 64, 64))]
        [(1, 8, 16, 16), (1, 16, 8, 8), (1, 24, 4, 4), (1, 32, 2, 2)]
    """

    def __init__(self, config: ImageEncoderConfig, *, image_size: int, pretrained: bool = False) -> None:
        super().__init__()
        import timm

        options: dict[str, Any] = _tupled(config.options) | ({"img_size": image_size} if config.fixed_size else {})
        name = config.name if pretrained else config.name.split(".")[0]
        self.body: Any = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
        info: Any = self.body.feature_info
        strides, self.channels = info.reduction()[-4:], tuple(info.channels()[-4:])
        if list(strides) != [4, 8, 16, 32]:
            raise ValueError(
                f"ImageEncoder: `config` must name a model with stages at strides 4, 8, 16, 32, got {strides} ({name})."
            )
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        check_shape("ImageEncoder", images=(images, "B 3 H W"))
        levels = []
        for level, norm in zip(self.body(images)[-4:], self.norms, strict=True):
            rows = level if self.channels_last else level.permute(0, 2, 3, 1)
            levels.append(norm(rows).permute(0, 3, 1, 2).contiguous())
        return levels


class TextEncoder(nn.Module):
    """Word features of a transformers model, projected to the model's width: Linear, LayerNorm, dropout.

    The normalised projection gives the phrase-object alignment a common space (Nguyen et al., arXiv:2411.15087, Sec. 3.2, say
    "embed into C channels" and no more).

    Args:
        config: The transformers model.
        dim: Width ``C`` of the projected tokens.
        vocab_size: Overrides the configuration's vocabulary size.
        pretrained: Fetch the weights (the only time that this class uses the network).

    Shape:
        - ``input_ids``, ``valid``: ``(B, L)``; returns ``(B, L, C)``.

    Example:
        >>> import torch
        >>> numbers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> encoder = TextEncoder(TextEncoderConfig("bert", numbers), 8, vocab_size=30)
        >>> tuple(encoder(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)).shape)
        (2, 5, 8)
    """

    def __init__(self, config: TextEncoderConfig, dim: int, *, vocab_size: int | None = None, pretrained: bool = False) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        if pretrained and config.pretrained:
            self.body = AutoModel.from_pretrained(config.pretrained, add_pooling_layer=False)
        else:
            numbers = dict(config.options) | ({} if vocab_size is None else {"vocab_size": vocab_size})
            self.body = AutoModel.from_config(AutoConfig.for_model(config.kind, **numbers), add_pooling_layer=False)
        self.width: int = self.body.config.hidden_size
        self.projection = nn.Linear(self.width, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, input_ids: Tensor, valid: Tensor) -> Tensor:
        """The transformers model's last hidden states, ``(B, L, width)``, before the projection."""
        check_shape("TextEncoder", input_ids=(input_ids, "B L"), valid=(valid, "B L"))
        return self.body(input_ids=input_ids, attention_mask=valid.to(torch.long)).last_hidden_state

    def forward(self, input_ids: Tensor, valid: Tensor) -> Tensor:
        return self.project(self.encode(input_ids, valid))

    def project(self, states: Tensor) -> Tensor:
        """Hidden states ``(B, L, width)`` to tokens ``(B, L, C)``."""
        return self.dropout(self.norm(self.projection(states)))


def _tupled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Lists become tuples: JSON knows no tuples, timm's models ask for them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def config_from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Rebuild a frozen configuration dataclass, nested ones included, from what ``dataclasses.asdict`` and JSON made of it.

    Raises:
        ValueError: If a key is not a field of the dataclass.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__}: `{unknown[0]}` must be one of {', '.join(known)}, got an unknown name.")
    built = {}
    for key, value in values.items():
        default = known[key].default if known[key].default is not dataclasses.MISSING else None
        nested = known[key].metadata.get("type") or (type(default) if dataclasses.is_dataclass(default) else None)
        if nested is not None and isinstance(value, Mapping):
            value = config_from_dict(nested, value)
        elif isinstance(value, Mapping):
            value = _tupled(value)
        elif isinstance(value, list):
            value = tuple(value)
        built[key] = value
    return cls(**built)
