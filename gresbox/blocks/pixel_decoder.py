"""The pixel decoder of Mask2Former: deformable attention over three levels and one top-down step to stride 4."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.blocks.deformable_attention import DeformableAttention
from gresbox.blocks.heads import FeedForward
from gresbox.blocks.position import sine_position

__all__ = ["DeformableAttention", "MSDeformPixelDecoder"]

# Other names of the same parameters, first Hugging Face's, then the official ones: (pattern, our name).
_MASK2FORMER_NAMES = (
    (r"(?:transformer\.)?level_embed", "level_embedding"),
    (r"input_proj(?:ections)?\.(\d+)\.([01])\.(weight|bias)", r"input_projections.\1.\2.\3"),
    (
        r"(?:transformer\.)?encoder\.layers\.(\d+)\.self_attn\."
        r"(sampling_offsets|attention_weights|value_proj|output_proj)\.(weight|bias)",
        r"layers.\1.attention.\2.\3",
    ),
    (r"(?:transformer\.)?encoder\.layers\.(\d+)\.(?:self_attn_layer_norm|norm1)\.(weight|bias)", r"layers.\1.norm.\2"),
    (r"(?:transformer\.)?encoder\.layers\.(\d+)\.(?:final_layer_norm|norm2)\.(weight|bias)", r"layers.\1.ffn.norm.\2"),
    (r"(?:transformer\.)?encoder\.layers\.(\d+)\.(?:fc|linear)([12])\.(weight|bias)", r"layers.\1.ffn.linear\2.\3"),
    (r"adapter_1\.(?:0\.)?weight", "lateral.0.weight"),
    (r"adapter_1\.(?:1|norm)\.(weight|bias)", r"lateral.1.\1"),
    (r"layer_1\.(?:0\.)?weight", "smooth.0.weight"),
    (r"layer_1\.(?:1|norm)\.(weight|bias)", r"smooth.1.\1"),
    (r"mask_(?:projection|features)\.(weight|bias)", r"mask_projection.\1"),
)
_PREFIX = re.compile(r"^(?:.*\.)?(?:pixel_level_module\.decoder|pixel_decoder)\.")


class _EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, both post-norm."""

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norm(x + self.attention(x + position, reference, x, shapes))
        return self.ffn(x)


class MSDeformPixelDecoder(nn.Module):
    r"""Turn a backbone's four feature maps into per-pixel features at stride 4 and a three-level memory.

    .. math:: (V_1, V_2, V_3) = \mathrm{MSDA}^{\times n}(\mathrm{GN}(W_l F_l) + e_l),\qquad
              V_4 = W\,\mathrm{ReLU}(\mathrm{GN}(W_{3\times3} * (\mathrm{GN}(W F_{4}) + \mathrm{up}(V_3))))

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 4.1; the pixel
    decoder of arXiv:2411.15087, Sec. 3.2.
    Differs from the paper: nothing. Where ``dim`` is not a multiple of 32, the number of normalisation groups is their greatest
    common divisor. There is no dropout, and no padding mask: images are never padded with invalid pixels here.

    Args:
        in_channels: Channels of the four maps, stride 4 first.
        dim: Channels ``C`` of the memory, a multiple of 4.
        mask_dim: Channels of the per-pixel features; None: ``dim``.
        num_layers: Encoder layers.
        num_heads: Heads of deformable attention.
        num_points: Points per head and level.
        ffn_dim: Width of the feed-forward layers.
        pixel_position: Add a sine table to the features before the mask projection, so that masks can tell equal objects apart by
            place from the first step on. Off in Mask2Former, where a pretrained backbone brings places along; it helps short
            trainings from scratch.

    Shape:
        - ``features``: four maps ``(B, C_i, h_i, w_i)`` of strides 4, 8, 16, 32; their sizes need not divide each other.
        - returns ``pixels`` ``(B, mask_dim, h_1, w_1)`` and ``memories``, three maps ``(B, C, h, w)`` of strides 32, 16, 8.

    Raises:
        ValueError: If there are not four maps, or their channels are not ``in_channels``.

    Example:
        >>> import torch
        >>> decoder = MSDeformPixelDecoder((8, 16, 24, 32), 32, num_layers=1, num_heads=4, ffn_dim=64)
        >>> maps = [torch.randn(1, c, 16 // s, 16 // s) for c, s in zip((8, 16, 24, 32), (1, 2, 4, 8))]
        >>> pixels, memories = decoder(maps)
        >>> pixels.shape, [tuple(m.shape[-2:]) for m in memories]
        (torch.Size([1, 32, 16, 16]), [(2, 2), (4, 4), (8, 8)])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        *,
        mask_dim: int | None = None,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        pixel_position: bool = False,
    ) -> None:
        super().__init__()
        self.pixel_position = pixel_position
        self.in_channels = tuple(in_channels)
        if len(self.in_channels) != 4:
            raise ValueError(f"MSDeformPixelDecoder: `in_channels` must be four numbers, stride 4 first, got {self.in_channels}.")
        if dim % 4:
            raise ValueError(f"MSDeformPixelDecoder: `dim` must be a multiple of 4, got {dim}.")
        groups = math.gcd(32, dim)
        coarse_first = self.in_channels[:0:-1]  # strides 32, 16, 8
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(groups, dim)) for channels in coarse_first
        )
        self.level_embedding = nn.Parameter(torch.empty(len(coarse_first), dim))
        self.layers = nn.ModuleList(
            _EncoderLayer(dim, len(coarse_first), num_heads, num_points, ffn_dim) for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(nn.Conv2d(self.in_channels[0], dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
        self.mask_projection = nn.Conv2d(dim, mask_dim or dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mask2Former's values: Xavier for the input projections, normal for the levels, Kaiming with a = 1 for the rest.

        The encoder layers draw their own when they are built.
        """
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)  # type: ignore[index]
            nn.init.zeros_(projection[0].bias)  # type: ignore[index]
        nn.init.normal_(self.level_embedding)
        for conv in (self.lateral[0], self.smooth[0], self.mask_projection):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]
        nn.init.zeros_(self.mask_projection.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if len(features) != 4:
            raise ValueError(f"MSDeformPixelDecoder: `features` must be four maps, strides 4 to 32, got {len(features)}.")
        maps = [f"features[{i}]" for i in range(4)]
        check_shape(
            "MSDeformPixelDecoder",
            **{name: (f, f"B {c} * *") for name, f, c in zip(maps, features, self.in_channels, strict=True)},
        )
        memories = self._encode([layer(f) for layer, f in zip(self.input_projections, features[:0:-1], strict=True)])
        fine = self.lateral(features[0])
        coarse = F.interpolate(memories[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
        smoothed = self.smooth(fine + coarse)
        if self.pixel_position:
            height, width = smoothed.shape[-2:]
            smoothed = smoothed + sine_position(height, width, smoothed.shape[1], device=smoothed.device, dtype=smoothed.dtype)
        return self.mask_projection(smoothed), memories

    def _encode(self, levels: list[Tensor]) -> list[Tensor]:
        """Let the levels read each other, ``[(B, C, h, w), ...] -> [(B, C, h, w), ...]``."""
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        x = torch.cat([level.flatten(2) for level in levels], dim=-1).transpose(1, 2)  # (B, S, C)
        positions = []
        for (height, width), embedding in zip(shapes, self.level_embedding, strict=True):
            table = sine_position(height, width, x.shape[-1], device=x.device, dtype=embedding.dtype)
            positions.append(table.flatten(1).T + embedding)
        position = torch.cat(positions)  # (S, C)
        centres = torch.cat([_pixel_centres(h, w, x.device, position.dtype) for h, w in shapes])  # (S, 2)
        reference = centres[None, :, None].expand(x.shape[0], -1, len(shapes), -1)
        for layer in self.layers:
            x = layer(x, position, reference, shapes)
        parts = x.split([h * w for h, w in shapes], dim=1)
        return [part.transpose(1, 2).unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def load_mask2former(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of a Mask2Former pixel decoder.

        Args:
            state_dict: Parameters under Hugging Face's or the official names: those of the pixel decoder alone, or of a whole
                model, of which everything outside the pixel decoder is left alone.

        Raises:
            ValueError: If a parameter is missing, unknown or of another shape; nothing is loaded then.
        """
        inside = {_PREFIX.sub("", key): value for key, value in state_dict.items() if _PREFIX.match(key)}
        renamed, unknown = {}, []
        for key, value in (inside or state_dict).items():
            name = _our_name(key)
            if name is None:
                unknown.append(key)
            else:
                renamed[name] = value
        own = self.state_dict()
        problems = _listed("missing", [key for key in own if key not in renamed])
        problems += _listed("unexpected", unknown + [key for key in renamed if key not in own])
        wrong = [key for key in own if key in renamed and own[key].shape != renamed[key].shape]
        problems += _listed("of another shape", [f"{k} {tuple(renamed[k].shape)} for {tuple(own[k].shape)}" for k in wrong])
        if problems:
            raise ValueError(
                "MSDeformPixelDecoder.load_mask2former: `state_dict` must hold exactly this decoder's parameters, "
                f"got {'; '.join(problems)}."
            )
        self.load_state_dict(renamed)


def _our_name(key: str) -> str | None:
    for pattern, ours in _MASK2FORMER_NAMES:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(ours)
    return None


def _listed(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return [f"{len(keys)} {what} ({shown})"]


def _pixel_centres(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres of a grid's pixels, xy in [0, 1], row by row: ``(H * W, 2)``."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)
