"""COCO's mask formats: run-length encodings and polygons, the same bits as pycocotools, with or without it.

The polygon rule (pixels of a five times finer boundary, walked column by column) and the run-length text are COCO's; see
https://cocodataset.org. Where pycocotools is installed, polygons are rasterised by it (some times faster); otherwise by the
NumPy form here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from gresbox._checks import check_choice

__all__ = ["check_rle", "decode_rle", "encode_rle", "is_polygon", "rasterise_polygons", "resize_nearest", "segmentation_mask"]

_FINE = 5  # polygon boundaries are walked on a grid this many times finer than the pixels


def is_polygon(part: object) -> bool:
    """Whether a polygon part can be rasterised: a flat list of at least three finite points.

    Args:
        part: One entry of a segmentation list.

    Example:
        >>> is_polygon([0, 0, 4, 0, 4, 4]), is_polygon([0, 0, 4, 4]), is_polygon([])
        (True, False, False)
    """
    if not isinstance(part, Sequence) or isinstance(part, str) or len(part) < 6 or len(part) % 2:
        return False
    return all(isinstance(number, int | float) and abs(number) < 1e7 for number in part)


def segmentation_mask(segmentation: Sequence[Sequence[float]] | Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """The mask of an annotation's ``segmentation``: the union of polygons, or a run-length encoding of either form.

    Args:
        segmentation: List of polygons, or a dictionary with ``size`` and ``counts``.
        height: The picture's.
        width: The picture's.

    Shape:
        - returns ``(height, width)`` bool.

    Raises:
        ValueError: If an encoding is not of this size.
    """
    if isinstance(segmentation, Mapping):
        check_rle("segmentation_mask", segmentation, height, width)
        return decode_rle(segmentation)
    return rasterise_polygons(segmentation, height, width)


def encode_rle(mask: np.ndarray, *, compressed: bool = True) -> dict[str, Any]:
    """Encode a mask as runs of 0 and 1 down its columns.

    Args:
        mask: The mask.
        compressed: Write the runs as COCO's text instead of a list.

    Shape:
        - ``mask``: ``(H, W)`` bool; returns ``{"size": [H, W], "counts": str or list}``.

    Example:
        >>> import numpy as np
        >>> encode_rle(np.array([[False, True], [True, True]]), compressed=False)
        {'size': [2, 2], 'counts': [1, 3]}
        >>> encode_rle(np.array([[False, True], [True, True]]))
        {'size': [2, 2], 'counts': '13'}
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    height, width = mask.shape
    return {"size": [height, width], "counts": _counts_to_text(counts) if compressed else counts}


def _counts_to_text(counts: list[int]) -> str:
    """Five bits per character, lowest first; from the fourth run on, the difference to the run two before."""
    letters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + 32 * more))
            if not more:
                break
    return "".join(letters)


def _text_to_counts(text: str | bytes) -> np.ndarray:
    raw = text.encode("utf-8") if isinstance(text, str) else text
    letters = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if letters.size and (letters.min() < 0 or letters.max() > 63 or letters[-1] & 32):
        raise ValueError("decode_rle: `counts` must be COCO's run-length text, got other characters or a cut text.")
    last = np.flatnonzero((letters & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1]) if last.size else last
    place = np.arange(letters.size) - np.repeat(first, last - first + 1)
    if place.size and place.max() > 11:
        raise ValueError("decode_rle: `counts` must be COCO's run-length text, got a number of more than 60 bits.")
    values = np.add.reduceat((letters & 31) << (5 * place), first) if last.size else letters
    negative = (letters[last] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (last - first + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _size_and_runs(rle: Mapping[str, Any]) -> tuple[int, int, np.ndarray]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(side, int) and side >= 0 for side in size):
        raise ValueError(f"decode_rle: `size` must be a height and a width in pixels, got {size!r}.")
    height, width = size
    if isinstance(counts, str | bytes):
        runs = _text_to_counts(counts)
    elif isinstance(counts, list | tuple | np.ndarray) and all(isinstance(run, int | np.integer) for run in counts):
        runs = np.array([run if abs(run) < 1 << 60 else -1 for run in counts], dtype=np.int64)
    else:
        raise ValueError("decode_rle: `counts` must be COCO's run-length text or a list of whole numbers, got something else.")
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"decode_rle: `counts` must be runs that fill {height} x {width} pixels, got a sum of {int(runs.sum())}.")
    return height, width, runs


def check_rle(who: str, rle: Mapping[str, Any], height: int, width: int) -> None:
    """Check a run-length encoding of a picture's mask without decoding it.

    Args:
        who: The caller's public name; it opens the message about the size.
        rle: ``{"size": [H, W], "counts": text, bytes or list}``.
        height: The picture's.
        width: The picture's.

    Raises:
        ValueError: If it is of another size, does not fill it, or is no encoding.

    Example:
        >>> check_rle("f", {"size": [2, 2], "counts": [1, 3]}, 2, 3)
        Traceback (most recent call last):
        ...
        ValueError: f: `segmentation` must be of size (2, 3), got (2, 2).
    """
    found = _size_and_runs(rle)[:2]
    if found != (height, width):
        raise ValueError(f"{who}: `segmentation` must be of size {(height, width)}, got {found}.")


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Decode a run-length encoding, compressed or not.

    Args:
        rle: ``{"size": [H, W], "counts": text, bytes or list}``.

    Shape:
        - returns ``(H, W)`` bool.

    Raises:
        ValueError: If the runs do not fill the size, or the text is not an encoding.

    Example:
        >>> decode_rle({"size": [2, 2], "counts": [1, 3]}).tolist()
        [[False, True], [True, True]]
    """
    height, width, runs = _size_and_runs(rle)
    flat = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask by taking the nearest pixel, by PIL, as the benchmarks' own code does: which of two equally near is its choice.

    Args:
        mask: The mask.
        size: Height and width, in pixels.

    Shape:
        - ``mask``: ``(H, W)`` bool; returns ``(h, w)`` bool.

    Example:
        >>> import numpy as np
        >>> resize_nearest(np.eye(4, dtype=bool), (2, 2)).tolist()
        [[True, False], [False, True]]
    """
    from PIL import Image

    picture = Image.fromarray(mask.astype(np.uint8))
    return np.array(picture.resize((size[1], size[0]), Image.Resampling.NEAREST)).astype(bool)


def rasterise_polygons(polygons: Sequence[Sequence[float]], height: int, width: int, *, backend: str = "auto") -> np.ndarray:
    """The union of polygons on the pixel grid, by COCO's rule.

    Args:
        polygons: Flat lists x0, y0, x1, y1, ... in pixels.
        height: The picture's.
        width: The picture's.
        backend: ``"numpy"``, ``"pycocotools"``, or ``"auto"``: the latter where it is installed. They give the same bits.

    Shape:
        - returns ``(height, width)`` bool.

    Raises:
        ValueError: If a part is no polygon.
        ImportError: If pycocotools is asked for and not installed.

    Example:
        >>> rasterise_polygons([[1, 1, 3, 1, 3, 3, 1, 3]], 4, 4, backend="numpy").astype(int).tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    check_choice("rasterise_polygons", "backend", backend, ("auto", "numpy", "pycocotools"))
    if not all(is_polygon(part) for part in polygons):
        raise ValueError("rasterise_polygons: `polygons` must be flat lists of at least three points, got another part.")
    installed = find_spec("pycocotools") is not None
    if backend == "pycocotools" and not installed:
        raise ImportError("rasterise_polygons: backend='pycocotools' needs pycocotools: pip install 'gresbox[coco]'.")
    mask = np.zeros((height, width), dtype=bool)
    if backend == "numpy" or not installed:
        for part in polygons:
            mask |= _polygon(np.asarray(part, dtype=np.float64), height, width)
    elif polygons:
        from pycocotools import mask as coco

        mask = decode_rle(coco.merge(coco.frPyObjects([list(part) for part in polygons], height, width)))
    return mask


def _polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    columns, rows = _boundary(points)
    step = np.flatnonzero(columns[1:] != columns[:-1])
    before, after = columns[step], columns[step + 1]
    x = (np.where(after < before, after, after - 1) + 0.5) / _FINE - 0.5
    y = (np.minimum(rows[step + 1], rows[step]) + 0.5) / _FINE - 0.5
    keep = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)  # crossings of pixel columns' centres
    x, y = x[keep].astype(np.int64), np.ceil(np.clip(y[keep], 0, height)).astype(np.int64)
    turns = np.sort(x * height + y)  # between an odd and an even one lies the inside
    runs = np.diff(np.concatenate([[0], turns, [height * width]]))
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T


def _boundary(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every point of the closed boundary on the fine grid; a line is walked along its longer axis, always upwards."""
    x, y = (np.trunc(_FINE * points[side::2] + 0.5).astype(np.int64) for side in (0, 1))
    x0, y0, x1, y1 = x, y, np.roll(x, -1), np.roll(y, -1)
    dx, dy = abs(x1 - x0), abs(y1 - y0)
    wide = dx >= dy
    flip = np.where(wide, x0 > x1, y0 > y1)
    x0, x1, y0, y1 = np.where(flip, x1, x0), np.where(flip, x0, x1), np.where(flip, y1, y0), np.where(flip, y0, y1)
    length = np.maximum(dx, dy)
    slope = np.where(wide, y1 - y0, x1 - x0) / np.maximum(length, 1)
    edge = np.repeat(np.arange(x.size), length + 1)
    place = np.arange(edge.size) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    place = np.where(flip[edge], length[edge] - place, place)
    other = np.trunc(np.where(wide, y0, x0)[edge] + slope[edge] * place + 0.5).astype(np.int64)
    main = np.where(wide, x0, y0)[edge] + place
    return np.where(wide[edge], main, other), np.where(wide[edge], other, main)
