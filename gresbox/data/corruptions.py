"""Seven ways to spoil a picture, each in five severities, for measuring how a model bears them. The truth stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape
from gresbox.data.randomness import Stream, noise
from gresbox.structures import GresSample

__all__ = ["CORRUPTIONS", "Corrupt", "corrupt_image"]

CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.4),
    "gaussian_noise": (0.04, 0.08, 0.13, 0.2, 0.3),
    "blur": (0.006, 0.01, 0.015, 0.02, 0.03),
    "colour_shift": (0.1, 0.2, 0.3, 0.45, 0.6),
    "haze": (0.3, 0.6, 1.0, 1.5, 2.2),
    "low_light": (0.7, 0.5, 0.35, 0.22, 0.12),
    "block_dropout": (0.1, 0.2, 0.3, 0.4, 0.5),
}
"""Name to strength at severity 1 to 5: share of the area under a rectangle; deviation over the range; deviation over the shorter
side; logarithm of the channels' gains; optical depth at the upper edge; gain; share of the blocks that are dropped."""

_MEAN_COLOUR = (124, 116, 104)  # ImageNet's, about zero once normalised
_BLOCKS_PER_SIDE = 14
_HAZE_LIGHT, _LOW_LIGHT_GAMMA = 230.0, 1.3


def corrupt_image(image: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Spoil one picture.

    The result depends on the arguments alone. A higher severity is the same place, pattern or direction with more strength. Sizes
    are relative to the picture's, so that small and large pictures suffer alike.

    Args:
        image: The picture.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: Names the random choices.

    Shape:
        - ``image``: ``(3, H, W)`` uint8; returns the same.

    Raises:
        TypeError: If the picture is not uint8.
        ValueError: If the name is unknown, the severity out of range or the shape does not fit.

    Example:
        >>> import torch
        >>> picture = torch.full((3, 28, 28), 200, dtype=torch.uint8)
        >>> [int(corrupt_image(picture, "low_light", severity)[0, 0, 0]) for severity in (1, 5)]
        [130, 22]
    """
    who = "corrupt_image"
    check_choice(who, "name", name, tuple(CORRUPTIONS))
    _check_severity(who, severity)
    sizes = check_shape(who, image=(image, "3 H W"))
    if image.dtype != torch.uint8:
        raise TypeError(f"{who}: `image` must be uint8, got {image.dtype}.")
    if not sizes["H"] * sizes["W"]:
        return image.clone()
    key = (tuple(CORRUPTIONS).index(name), seed)
    spoilt = _SPOIL[name](image.float(), CORRUPTIONS[name][severity - 1], key)
    return spoilt.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Corrupt:
    """Spoil a sample's picture, the same way whenever that picture comes; a data set's ``transform``.

    Args:
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: Other random choices of the same kind.

    Raises:
        ValueError: If the name is unknown or the severity out of range.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> clean, spoilt = SyntheticGRES("val", 2)[1], SyntheticGRES("val", 2, transform=Corrupt("haze", 4))[1]
        >>> (clean.image == spoilt.image).all().item(), (clean.target.merged == spoilt.target.merged).all().item()
        (False, True)
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("Corrupt", "name", self.name, tuple(CORRUPTIONS))
        _check_severity("Corrupt", self.severity)

    def __call__(self, sample: GresSample) -> GresSample:
        seed = Stream(self.seed, sample.image_id).bits()
        return replace(sample, image=corrupt_image(sample.image, self.name, self.severity, seed=seed))


def _check_severity(who: str, severity: int) -> None:
    if not isinstance(severity, int) or isinstance(severity, bool):
        raise TypeError(f"{who}: `severity` must be a whole number, got {severity!r}.")
    check_range(who, "severity", severity, 1, 5)


def _occlude(image: Tensor, share: float, key: tuple[int, int]) -> Tensor:
    """One rectangle in one colour; a stronger one grows around the same point, pushed inside where it would stick out."""
    stream = Stream(*key)
    colour = [float(stream.below(256)) for _ in range(3)]
    across, down, form = (stream.below(2**16) / 2**16 for _ in range(3))
    height, width = image.shape[-2:]
    aspect = 0.6 + form / 1.5  # of the picture's own; below 1 + 4 / 15, so that severity 5 still fits
    sides = []
    for extent, side, place in ((height, math.sqrt(share * aspect), down), (width, math.sqrt(share / aspect), across)):
        length = max(1, round(side * extent))
        start = min(max(round(place * extent - length / 2), 0), extent - length)
        sides.append(slice(start, start + length))
    spoilt = image.clone()
    spoilt[:, sides[0], sides[1]] = torch.tensor(colour)[:, None, None]
    return spoilt


def _add_noise(image: Tensor, deviation: float, key: tuple[int, int]) -> Tensor:
    """Independent normal numbers, by Box and Muller's formula from hashed positions."""
    first, second = ((noise(Stream(*key, part).bits(), tuple(image.shape)) >> np.uint64(11)) + 0.5 for part in range(2))
    normal = np.sqrt(-2 * np.log(first / 2**53)) * np.cos(2 * np.pi * second / 2**53)
    return image + 255 * deviation * torch.from_numpy(normal).float()


def _blur(image: Tensor, deviation: float, key: tuple[int, int]) -> Tensor:
    """A Gaussian in both directions; beyond the edge the last pixel goes on."""
    sigma = deviation * min(image.shape[-2:])
    radius = max(1, math.ceil(3 * sigma))
    edges = torch.arange(-radius, radius + 2, dtype=torch.float64) - 0.5
    kernel = torch.erf(edges / (sigma * math.sqrt(2))).diff()  # integrated over each pixel: a narrow one still blurs
    kernel = (kernel / kernel.sum()).float()[None, None]
    planes = image[:, None]  # (3, 1, H, W)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel[:, :, None])
    return F.conv2d(F.pad(planes, (0, 0, radius, radius), mode="replicate"), kernel[..., None])[:, 0]


def _shift_colour(image: Tensor, strength: float, key: tuple[int, int]) -> Tensor:
    """A cast, as of another light: one channel brighter, one darker, one as it is."""
    gains = Stream(*key).shuffled([math.exp(strength), 1.0, math.exp(-strength)])
    return image * torch.tensor(gains)[:, None, None]


def _add_haze(image: Tensor, depth: float, key: tuple[int, int]) -> Tensor:
    """Scattered light, denser towards the upper edge, where a scene is farther away; half as deep at the lower edge."""
    rows = torch.linspace(1.0, 0.5, image.shape[-2])
    seen = torch.exp(-depth * rows)[:, None]
    return image * seen + _HAZE_LIGHT * (1 - seen)


def _darken(image: Tensor, gain: float, key: tuple[int, int]) -> Tensor:
    """Less light and a steeper curve; what falls between two of the few levels that are left is lost."""
    return 255 * gain * (image / 255) ** _LOW_LIGHT_GAMMA


def _drop_blocks(image: Tensor, share: float, key: tuple[int, int]) -> Tensor:
    """A share of small square blocks in the mean colour; a stronger one drops the same blocks and more."""
    height, width = image.shape[-2:]
    side = max(1, round(min(height, width) / _BLOCKS_PER_SIDE))
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    order = Stream(*key).shuffled(list(range(rows * columns)))
    grid = torch.zeros(rows * columns, dtype=torch.bool)
    grid[order[: int(share * rows * columns)]] = True
    dropped = grid.view(rows, columns).repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    return torch.where(dropped, torch.tensor(_MEAN_COLOUR, dtype=torch.float32)[:, None, None], image)


_SPOIL: dict[str, Callable[[Tensor, float, tuple[int, int]], Tensor]] = {
    "occlusion": _occlude,
    "gaussian_noise": _add_noise,
    "blur": _blur,
    "colour_shift": _shift_colour,
    "haze": _add_haze,
    "low_light": _darken,
    "block_dropout": _drop_blocks,
}
