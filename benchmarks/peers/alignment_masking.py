"""Alignment-aware masking by patches, one sample at a time.

Of pipashu1/AMLRIS at 930e56b, ``model/models_aug/amlris.py``: ``TextGuidedVisualEnhancer``, where one linear layer stands for the
projections, and ``mask_image_with_relevance`` with ``patchify`` and ``unpatchify``. As there, picture and similarity are cut into
patches for the whole batch, a loop over the samples picks among a sample's weak patches, and the picture is put together again.

Different semantics from that file, so that outputs can be compared: its indices name pairs of patch and pixel and hide unrelated
patches. Here, by pixel, the patches go that hold one of the ``floor(drop * n)`` weak pixels with the least noise, as the paper
says; by block, of the ``n`` patches that hold a weak pixel those ``floor(drop * n)`` with the least noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def match_by_projecting_both(visual: Tensor, tokens: Tensor, valid: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``(B, C, h, w)``, ``(B, L, D)``, ``(B, L)`` -> similarity ``(B, h, w)``; both sides are projected, patches too."""
    patches = F.normalize(visual.flatten(2).transpose(1, 2), dim=-1) @ left
    words = F.normalize(tokens, dim=-1) @ right
    logits = scale * torch.bmm(patches, words.transpose(1, 2))
    logits = logits.masked_fill(valid[:, None] == 0, float("-inf"))
    return logits.softmax(-1).max(-1).values.unflatten(1, visual.shape[-2:])


def hide_by_patches(
    images: Tensor, similarity: Tensor, noise: Tensor, *, unit: str, threshold: float = 0.4, drop: float = 0.25, block: int = 32
) -> Tensor:
    """``(B, 3, H, W)``, ``(B, h, w)``, noise ``(B, patches)`` or ``(B, H, W)`` -> the masked pictures."""
    smooth = F.interpolate(similarity[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)
    picture_patches, weak = _patches(images, block).clone(), _patches(smooth, block)
    if unit == "pixel":
        noise = _patches(noise[:, None], block)
    for sample in range(images.shape[0]):
        flags = weak[sample] < threshold
        candidates = (flags if unit == "pixel" else flags.any(-1)).nonzero()
        if len(candidates) == 0:
            continue
        values = noise[sample][tuple(candidates.T)]
        chosen = candidates[values.argsort()[: int(drop * len(candidates))]]
        picture_patches[sample, chosen[:, 0]] = 0.0
    return _picture(picture_patches, block, images.shape)


def _patches(images: Tensor, block: int) -> Tensor:
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // block, block, width // block, block)
    return torch.einsum("bcryqx->brqyxc", cut).reshape(batch, -1, block * block * channels)


def _picture(patches: Tensor, block: int, shape: torch.Size) -> Tensor:
    batch, channels, height, width = shape
    cut = patches.reshape(batch, height // block, width // block, block, block, channels)
    return torch.einsum("brqyxc->bcryqx", cut).reshape(shape)
