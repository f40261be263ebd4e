"""How large a piece of an image the factored ops hold at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "pieces_of", "write_product"]

_CPU_VALUES, _DEVICE_VALUES = 2**19, 2**24  # of the masks of a piece: that fit a cache or fill a GPU
_SMALL = 2**18  # masks of an image with fewer values are not cut
_PANEL_VALUES = 3 * 2**15  # of the features under one matrix of a product: they stay in a core's cache meanwhile


@dataclass(frozen=True)
class Piece:
    """Pixels of some images, or of one image in ``parts`` runs of equal length: the matrices of one batched product.

    A CPU multiplies a batch of matrices with one core for each, which is faster than one product by all cores.
    """

    images: slice
    pixels: slice
    parts: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """``(B, X, P)`` to ``(images or parts, X, pixels of each)``, a view."""
        cut = tensor[self.images, :, self.pixels]
        return cut if self.parts == 1 else cut[0].unflatten(-1, (self.parts, -1)).movedim(-2, 0)

    def each(self, tensor: Tensor) -> Tensor:
        """``(B, ...)`` to ``(images or parts, ...)``, a view: what the parts of an image share."""
        own = tensor[self.images]
        return own if self.parts == 1 else own.expand(self.parts, *own.shape[1:])

    def total(self, tensor: Tensor) -> Tensor:
        """``(images or parts, ...)`` to ``(images, ...)``, the parts added up."""
        return tensor if self.parts == 1 else tensor.sum(0, keepdim=True)


def pieces_of(batch: int, maps: int, channels: int, pixels: int, chunk: int, device: torch.device) -> Iterator[Piece]:
    """The pieces of a batch of which ``maps`` masks an image are built from ``channels`` features.

    Args:
        batch: Images.
        maps: Masks of each.
        channels: Of the pixel features.
        pixels: Of an image.
        chunk: Pixels of a piece, of all images; 0: several images, or a part of one, by size.
        device: Where the product runs.
    """
    if chunk or not pixels:
        return (Piece(slice(0, batch), slice(start, start + chunk)) for start in range(0, pixels, max(chunk, 1)))
    on_cpu = device.type == "cpu"
    whole = _SMALL if on_cpu else _DEVICE_VALUES
    if maps * pixels <= whole:
        images = whole // max(maps * pixels, 1)
        return (Piece(slice(image, image + images), slice(0, pixels)) for image in range(0, batch, images))
    if on_cpu:
        runs = _runs(maps, channels, pixels)
    else:
        part = max(1, _DEVICE_VALUES // maps)
        runs = [(slice(start, start + part), 1) for start in range(0, pixels, part)]
    return (Piece(slice(image, image + 1), part, parts) for image in range(batch) for part, parts in runs)


def _runs(maps: int, channels: int, pixels: int) -> list[tuple[slice, int]]:
    """Ranges of an image's pixels, and in how many matrices each is multiplied."""
    cores = torch.get_num_threads()
    width = max(1, min(_PANEL_VALUES // max(channels, 1), _CPU_VALUES // maps, -(-pixels // cores)))
    parts = max(1, min(4 * cores, _CPU_VALUES // (maps * width)))
    found, start = [], 0
    while start < pixels:
        parts = max(1, min(parts, (pixels - start) // width))
        found.append((slice(start, min(start + parts * width, pixels)), parts))
        start += parts * width
    return found


def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Batched, without a second copy where dtypes allow it: on the CPU making that is a third of the product's time."""
    if out.dtype == right.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))
