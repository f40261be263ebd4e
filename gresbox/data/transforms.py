"""Bring samples to a square. Pictures are never padded with invalid pixels: a border is background, cut off before scoring."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_range
from gresbox.structures import GresSample, GresTarget

__all__ = ["Letterbox", "Resize", "letterbox_window", "resize_image", "resize_masks"]


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a picture, bilinear with antialiasing, rounded to the nearest of 256 values.

    Args:
        image: The picture.
        size: Height and width.

    Shape:
        - ``image``: ``(3, H, W)`` uint8; returns ``(3, h, w)`` uint8.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks by area: a pixel is set where at least half of the source pixels it touches are.

    A mask that would vanish keeps its fullest pixels, so that no instance is lost.

    Args:
        masks: The masks.
        size: Height and width.

    Shape:
        - ``masks``: ``(M, H, W)`` bool; returns ``(M, h, w)`` bool.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> mask[0, 0, 0] = True
        >>> resize_masks(mask, (2, 2)).int().tolist()
        [[[1, 0], [0, 0]]]
    """
    if tuple(masks.shape[-2:]) == size or not masks.shape[0]:
        return masks if tuple(masks.shape[-2:]) == size else masks.new_zeros(0, *size)
    share = F.adaptive_avg_pool2d(masks.float(), size)
    fullest = share.amax((-2, -1), keepdim=True)
    return (share >= fullest.clamp(max=0.5)) & (share > 0)


@dataclass(frozen=True)
class Resize:
    """Squash a sample to a square, as ReLA does.

    The boxes stay as they are: they are relative to the picture. Differs from ReLA: the masks are resized by :func:`resize_masks`,
    where ReLA scales the polygons and rasterises them at the new size.

    Args:
        size: Side of the square, in pixels.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> tuple(Resize(32)(SyntheticGRES("val", 1)[0]).image.shape)
        (3, 32, 32)
    """

    size: int

    def __post_init__(self) -> None:
        check_range("Resize", "size", self.size, 1)

    def __call__(self, sample: GresSample) -> GresSample:
        square, target = (self.size, self.size), sample.target
        assert target.merged is not None
        resized = GresTarget(
            resize_masks(target.masks, square),
            target.boxes,
            merged=resize_masks(target.merged[None], square)[0],
            no_target=target.no_target,
        )
        return replace(sample, image=resize_image(sample.image, square), target=resized)


def letterbox_window(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Where a picture lies in a square that keeps its aspect: top, left, height and width of its part, in pixels.

    Args:
        height: The picture's.
        width: The picture's.
        size: Side of the square.

    Example:
        >>> letterbox_window(480, 640, 64)
        (8, 0, 48, 64)
    """
    longer = max(height, width)
    inner_height, inner_width = (max((2 * side * size + longer) // (2 * longer), 1) for side in (height, width))
    return (size - inner_height) // 2, (size - inner_width) // 2, inner_height, inner_width


@dataclass(frozen=True)
class Letterbox:
    """Fit a sample into a square, keeping its aspect; the border is a plain colour and background in every mask.

    :func:`letterbox_window` says which part of a prediction to cut out before it is scored at the picture's own size.

    Args:
        size: Side of the square, in pixels.
        fill: RGB of the border; default: ImageNet's mean, which normalises to about zero.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> tuple(Letterbox(96)(SyntheticGRES("val", 1)[0]).image.shape)
        (3, 96, 96)
    """

    size: int
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        check_range("Letterbox", "size", self.size, 1)

    def __call__(self, sample: GresSample) -> GresSample:
        target = sample.target
        assert target.merged is not None
        assert target.boxes is not None
        top, left, height, width = letterbox_window(sample.image.shape[-2], sample.image.shape[-1], self.size)
        image = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        image[:, top : top + height, left : left + width] = resize_image(sample.image, (height, width))
        border = (left, self.size - left - width, top, self.size - top - height)
        masks = F.pad(resize_masks(target.masks, (height, width)), border)
        merged = F.pad(resize_masks(target.merged[None], (height, width)), border)[0]
        scale = torch.tensor([width, height, width, height]) / self.size
        boxes = target.boxes * scale + torch.tensor([left, top, 0, 0]) / self.size
        return replace(sample, image=image, target=GresTarget(masks, boxes, merged=merged, no_target=target.no_target))
