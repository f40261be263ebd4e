"""The decoder of CARIS: words and pixels of three levels read each other; then every pixel is compared with two embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape
from gresbox.blocks.deformable_attention import DeformableAttention
from gresbox.blocks.heads import MLP, FeedForward
from gresbox.blocks.position import sine_position

__all__ = ["CarisDecoder", "CarisLayer"]


class _WideAttention(nn.Module):
    """Multi-head attention whose heads together may be wider than its input; ``valid`` is True on keys that may be read."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(dim, inner_dim)
        self.v_proj = nn.Linear(dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        allowed = None if valid is None else valid[:, None, None]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, ., D)


class CarisLayer(nn.Module):
    r"""Words read the pixels and each other, then the pixels read the words and their surroundings.

    .. math::
        T_1 &= \mathrm{LN}(T + \gamma_T \odot \mathrm{MHA}(T,\; V + e,\; V)), &
        T_2 &= \mathrm{LN}(T_1 + \mathrm{MHA}(T_1, T_1, T_1)), & T' &= \mathrm{FFN}(T_2) \\
        V_1 &= \mathrm{LN}(V + \gamma_V \odot \mathrm{MHA}(V + e,\; T',\; T')), &
        V_2 &= \mathrm{LN}(V_1 + \mathrm{MSDA}(V_1 + e,\; V_1)), & V' &= \mathrm{FFN}(V_2)

    Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117, as its
    released code has it, github.com/lsa1997/CARIS, ``model/msdeform_decoder.py``: attentions four times as wide as the features,
    a learned scale per channel on what each side takes from the other, post-norm.
    Differs from that code: attention scores are not clamped at 50000, which only half precision could reach; no dropout, which it
    switches off.

    Args:
        dim: Channels ``C``.
        num_levels: Levels of the pixels.
        num_heads: Heads of all attentions.
        num_points: Points per head and level of the deformable attention.
        ffn_dim: Hidden width of the feed-forward layers.
        attention_dim: Width of the heads of a dense attention together; a multiple of ``num_heads``.

    Shape:
        - ``pixels``: ``(B, S, C)``, the levels one after another; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` bool, at least
          one True per row; ``position``: ``(S, C)``; ``reference``: ``(B, S, levels, 2)`` xy in [0, 1]; ``spatial_shapes``:
          ``[(H, W), ...]``.
        - returns the new pixels and tokens, same shapes.

    Raises:
        ValueError: If a width is no multiple of ``num_heads`` or a shape does not fit.

    Example:
        >>> import torch
        >>> layer = CarisLayer(16, num_levels=2, num_heads=4, ffn_dim=32, attention_dim=32)
        >>> pixels, tokens, valid = torch.randn(1, 20, 16), torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.bool)
        >>> position, reference = torch.randn(20, 16), torch.rand(1, 20, 2, 2)
        >>> [tuple(out.shape) for out in layer(pixels, tokens, valid, position, reference, [(2, 2), (4, 4)])]
        [(1, 20, 16), (1, 3, 16)]
    """

    def __init__(
        self,
        dim: int,
        *,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        attention_dim: int = 1024,
    ) -> None:
        super().__init__()
        for name, width in (("dim", dim), ("attention_dim", attention_dim)):
            if width % num_heads:
                raise ValueError(f"CarisLayer: `{name}` must be a multiple of num_heads={num_heads}, got {width}.")
        self.tokens_read = _WideAttention(dim, attention_dim, num_heads)
        self.tokens_read_norm = nn.LayerNorm(dim)
        self.tokens_read_gamma = nn.Parameter(torch.empty(dim))
        self.token_attention = _WideAttention(dim, attention_dim, num_heads)
        self.token_attention_norm = nn.LayerNorm(dim)
        self.token_ffn = FeedForward(dim, ffn_dim)
        self.pixels_read = _WideAttention(dim, attention_dim, num_heads)
        self.pixels_read_norm = nn.LayerNorm(dim)
        self.pixels_read_gamma = nn.Parameter(torch.empty(dim))
        self.pixel_attention = DeformableAttention(dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points)
        self.pixel_attention_norm = nn.LayerNorm(dim)
        self.pixel_ffn = FeedForward(dim, ffn_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released code's values: narrow normal matrices, scales of one. Deformable attention draws its own when built."""
        deformable = set(self.pixel_attention.modules())
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer not in deformable:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.ones_(self.tokens_read_gamma)
        nn.init.ones_(self.pixels_read_gamma)

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor,
        valid: Tensor,
        position: Tensor,
        reference: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        check_shape(
            "CarisLayer", pixels=(pixels, "B S C"), tokens=(tokens, "B L C"), valid=(valid, "B L"), position=(position, "S C")
        )
        seen = self.tokens_read(tokens, pixels + position, pixels)
        tokens = self.tokens_read_norm(tokens + self.tokens_read_gamma * seen)
        tokens = self.token_attention_norm(tokens + self.token_attention(tokens, tokens, tokens, valid))
        tokens = self.token_ffn(tokens)
        told = self.pixels_read(pixels + position, tokens, tokens, valid)
        pixels = self.pixels_read_norm(pixels + self.pixels_read_gamma * told)
        around = self.pixel_attention(pixels + position, reference, pixels, spatial_shapes)
        pixels = self.pixel_attention_norm(pixels + around)
        return self.pixel_ffn(pixels), tokens


class CarisDecoder(nn.Module):
    r"""From four feature maps and an expression's words to one mask.

    .. math:: (V_n, T_n, P_n) = \mathrm{layer}^{\times n}(V_0, T_0, P),\qquad
              z_{hw} = \big(\phi(T_n^{1}) - \phi(\overline{P_n})\big) \cdot F_{hw}

    ``P`` are learned prompts, which stand behind the words and speak for the background; the first word, ``[CLS]``, speaks for the
    foreground; :math:`\phi` is a perceptron, ``F`` are the pixels at stride 4.

    Paper: Liu et al., "CARIS: Context-Aware Referring Image Segmentation", ACM MM 2023, doi:10.1145/3581783.3612117, as its
    released code has it, github.com/lsa1997/CARIS, ``model/msdeform_decoder.py``.
    Differs from that code: it returns one logit per pixel, foreground minus background, on which alone its softmax, its loss and
    its arg max depend. Where ``dim`` is not a multiple of 32, the number of normalisation groups is their greatest common divisor.

    Args:
        in_channels: Channels of the four maps, stride 4 first.
        dim: Channels ``C``, a multiple of 4.
        num_layers: Vision-language layers.
        num_heads: Heads of all attentions.
        num_points: Points per head and level of the deformable attention.
        ffn_dim: Hidden width of the feed-forward layers.
        attention_dim: Width of the heads of a dense attention together.
        num_prompts: Learned prompts ``K``.

    Shape:
        - ``features``: four maps ``(B, C_i, h_i, w_i)`` of strides 4, 8, 16, 32; their sizes need not divide each other.
        - ``tokens``: ``(B, L, C)``, the first of them speaks for the whole expression; ``valid``: ``(B, L)`` True on real tokens.
        - returns ``(B, h_1, w_1)`` logits, float32 (float64 for float64), positive = referred to.

    Raises:
        ValueError: If a number or a shape does not fit.

    Example:
        >>> import torch
        >>> decoder = CarisDecoder((8, 16, 24, 32), 16, num_layers=1, num_heads=4, ffn_dim=32, attention_dim=32)
        >>> maps = [torch.randn(1, c, 16 // s, 16 // s) for c, s in zip((8, 16, 24, 32), (1, 2, 4, 8))]
        >>> decoder(maps, torch.randn(1, 5, 16)).shape
        torch.Size([1, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        *,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        attention_dim: int = 1024,
        num_prompts: int = 5,
    ) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels)
        if len(self.in_channels) != 4:
            raise ValueError(f"CarisDecoder: `in_channels` must be four numbers, stride 4 first, got {self.in_channels}.")
        if dim % 4:
            raise ValueError(f"CarisDecoder: `dim` must be a multiple of 4, got {dim}.")
        for name, value in (("num_layers", num_layers), ("num_prompts", num_prompts)):
            check_range("CarisDecoder", name, value, 1)
        groups = math.gcd(32, dim)
        coarse_first = self.in_channels[:0:-1]  # strides 32, 16, 8
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(groups, dim)) for channels in coarse_first
        )
        self.level_embedding = nn.Parameter(torch.empty(len(coarse_first), dim))
        self.prompt_tokens = nn.Parameter(torch.empty(num_prompts, dim))
        self.layers = nn.ModuleList(
            CarisLayer(
                dim,
                num_levels=len(coarse_first),
                num_heads=num_heads,
                num_points=num_points,
                ffn_dim=ffn_dim,
                attention_dim=attention_dim,
            )
            for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(nn.Conv2d(self.in_channels[0], dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
        self.pixel_head = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )
        self.mask_head = MLP(dim, dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal levels and prompts, as in the released code; all else keeps its module's own values."""
        nn.init.normal_(self.level_embedding)
        nn.init.normal_(self.prompt_tokens)

    def forward(self, features: Sequence[Tensor], tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        tokens, valid = self._checked(features, tokens, valid)
        levels = [layer(level) for layer, level in zip(self.input_projections, features[:0:-1], strict=True)]
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        position, centres = self._places(shapes, tokens.device)
        reference = centres[None, :, None].expand(tokens.shape[0], -1, len(shapes), -1)
        pixels = torch.cat([level.flatten(2) for level in levels], dim=-1).transpose(1, 2)  # (B, S, C)
        for layer in self.layers:
            pixels, tokens = layer(pixels, tokens, valid, position, reference, shapes)
        finest = pixels[:, -shapes[-1][0] * shapes[-1][1] :].transpose(1, 2).unflatten(-1, shapes[-1])
        fine = self.lateral(features[0])
        coarse = F.interpolate(finest, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        embedded = self.pixel_head(self.smooth(fine + coarse))  # (B, C, h, w)
        prompts = tokens[:, -self.prompt_tokens.shape[0] :]
        sides = self.mask_head(torch.stack([prompts.mean(1), tokens[:, 0]], dim=1))  # (B, 2, C)
        wide = torch.promote_types(embedded.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            background, foreground = sides.to(wide).unbind(1)
            return torch.einsum("bc,bchw->bhw", foreground - background, embedded.to(wide))

    def _checked(self, features: Sequence[Tensor], tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Words with the prompts behind them, and which of them may be read: real words and all prompts."""
        if len(features) != 4:
            raise ValueError(f"CarisDecoder: `features` must be four maps, strides 4 to 32, got {len(features)}.")
        maps = zip((f"features[{i}]" for i in range(4)), features, self.in_channels, strict=True)
        named = {name: (level, f"B {channels} * *") for name, level, channels in maps}
        count, dim = self.prompt_tokens.shape
        check_shape("CarisDecoder", **named, tokens=(tokens, f"B L {dim}"))
        batch = tokens.shape[0]
        if valid is None:
            real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        else:
            check_shape("CarisDecoder", tokens=(tokens, "B L C"), valid=(valid, "B L"))
            real = valid.bool()
            tokens = tokens.masked_fill(~real[..., None], 0.0)  # nobody reads padding, but zero times infinity would be NaN
        tokens = torch.cat([tokens, self.prompt_tokens.to(tokens.dtype).expand(batch, -1, -1)], dim=1)
        return tokens, torch.cat([real, real.new_ones(batch, count)], dim=1)

    def _places(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Position and level of every pixel ``(S, C)``, and its centre, xy in [0, 1], ``(S, 2)``."""
        positions, centres = [], []
        for (height, width), level in zip(shapes, self.level_embedding, strict=True):
            table = sine_position(height, width, level.shape[0], device=device, dtype=level.dtype)
            positions.append(table.flatten(1).T + level)
            y = (torch.arange(height, device=device, dtype=level.dtype) + 0.5) / height
            x = (torch.arange(width, device=device, dtype=level.dtype) + 0.5) / width
            centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1))
        return torch.cat(positions), torch.cat(centres)
