"""Plain shapes as exact pixel sets: integer arithmetic only, so every platform draws the same bytes."""

from __future__ import annotations

import numpy as np

__all__ = ["COLOURS", "PATTERNS", "SHAPES", "SIZES", "UNITS", "draw_shape", "paint"]

UNITS = 1024
"""Scenes live on a square of this many units per side, whatever the picture's size in pixels."""

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (236, 214, 40),
    "purple": (140, 50, 170),
    "orange": (244, 132, 24),
    "cyan": (50, 200, 214),
    "white": (240, 240, 240),
}
SIZES = ("small", "large")
PATTERNS = ("plain", "striped", "checkered")

# Outward normals of a pentagram's five lines, times 1000; each line is 309 / 1000 of the radius from the centre.
_STAR_NORMALS = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))


def draw_shape(shape: str, x: int, y: int, radius: int, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The pixels whose centres lie in a shape.

    Args:
        shape: One of :data:`SHAPES`.
        x: Centre's column, in units.
        y: Centre's row, in units.
        radius: Half the extent, in units.
        size: Side of the picture, in pixels.

    Shape:
        - returns the window (rows, columns) of the picture and the shape inside it as ``(h, w)`` bool.

    Example:
        >>> window, inside = draw_shape("square", 512, 512, 128, 64)
        >>> inside.shape, int(inside.sum())
        ((18, 18), 196)
    """
    rows, columns = _window(y, radius, size), _window(x, radius, size)
    # everything times 2 * size, so that pixel centres and object centres are both integers
    dx = ((2 * np.arange(columns.start, columns.stop, dtype=np.int64) + 1) * UNITS - 2 * size * x)[None, :]
    dy = ((2 * np.arange(rows.start, rows.stop, dtype=np.int64) + 1) * UNITS - 2 * size * y)[:, None]
    return (rows, columns), _inside(shape, dx, dy, 2 * size * radius)


def _window(centre: int, radius: int, size: int) -> slice:
    return slice(max((centre - radius) * size // UNITS, 0), min((centre + radius) * size // UNITS + 2, size))


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: int) -> np.ndarray:
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        half = radius * 7 // 8
        return (abs(dx) <= half) & (abs(dy) <= half)
    if shape == "triangle":
        return (dy <= radius) & (2 * abs(dx) <= dy + radius)
    if shape == "cross":
        arm = radius * 3 // 8
        return (abs(dx) <= radius) & (abs(dy) <= radius) & ((abs(dx) <= arm) | (abs(dy) <= arm))
    if shape == "ring":
        square = dx * dx + dy * dy
        return (square <= radius * radius) & (square * 4 > radius * radius)
    # a pentagram: inside all five lines is the middle, inside four of them is a tip
    lines = sum(((a * dx + b * dy <= 309 * radius).astype(np.int8) for a, b in _STAR_NORMALS), np.int8(0))
    return np.asarray(lines) >= 4


def paint(
    image: np.ndarray, window: tuple[slice, slice], inside: np.ndarray, colour: tuple[int, int, int], pattern: str = "plain"
) -> None:
    """Paint a shape into a picture, in place.

    Args:
        image: The picture.
        window: Rows and columns of the shape's window.
        inside: The shape in that window.
        colour: RGB, 0 to 255.
        pattern: One of :data:`PATTERNS`: bands or squares of a darker shade.

    Shape:
        - ``image``: ``(H, W, 3)`` uint8; ``inside``: ``(h, w)`` bool.
    """
    part = image[window]
    part[inside] = colour
    if pattern != "plain":
        cell = max(image.shape[0] * 2 // 64, 1) if pattern == "striped" else max(image.shape[0] * 3 // 64, 1)
        rows = np.arange(inside.shape[0])[:, None] // cell
        columns = np.arange(inside.shape[1])[None, :] // cell
        odd = (rows if pattern == "striped" else rows + columns) % 2 == 1
        part[inside & odd] = tuple(channel // 4 for channel in colour)
