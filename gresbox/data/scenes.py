"""Synthetic scenes: which objects there are, where, and what of them is visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gresbox.data.randomness import Stream, noise
from gresbox.data.shapes import COLOURS, PATTERNS, SHAPES, SIZES, UNITS, draw_shape, paint

__all__ = ["HELD_OUT", "LEVELS", "SPLITS", "Level", "Scene", "SceneObject", "draw_scene", "render"]

SPLITS = ("train", "val", "testA", "testB")

HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("cross", "red"),
        ("star", "green"),
        ("ring", "orange"),
        ("circle", "cyan"),
        ("triangle", "white"),
    }
)
"""Pairs of shape and colour that only ``testA`` shows or names."""

_GAP = 16  # units between separate objects, and to the border: one pixel at 64 pixels
_TRIES = 24  # positions tried per object before it is left out


@dataclass(frozen=True)
class Level:
    """What the scenes of a level are made of.

    Args:
        shapes: Shapes that occur.
        colours: Colours that occur.
        sizes: Names of the sizes with their smallest and largest radius in units.
        patterns: Surface patterns with integer weights.
        counts: Fewest and most objects of a scene; of a scene of ``testB``.
        occluding: Scenes out of 100 whose objects may hide each other; of ``testB``.
        visible: Percent of an object's pixels that always stay visible; in ``testB``.
        textured: Whether backgrounds have a texture.
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[tuple[str, int, int], ...]
    patterns: tuple[tuple[str, int], ...]
    counts: tuple[tuple[int, int], tuple[int, int]]
    occluding: tuple[int, int]
    visible: tuple[int, int]
    textured: bool


LEVELS = {
    "basic": Level(
        shapes=SHAPES[:4],
        colours=tuple(COLOURS)[:6],
        sizes=(("large", 80, 176),),
        patterns=(("plain", 1),),
        counts=((2, 5), (5, 8)),
        occluding=(0, 100),
        visible=(100, 50),
        textured=False,
    ),
    "full": Level(
        shapes=SHAPES,
        colours=tuple(COLOURS),
        sizes=((SIZES[0], 80, 104), (SIZES[1], 144, 176)),
        patterns=((PATTERNS[0], 2), (PATTERNS[1], 1), (PATTERNS[2], 1)),
        counts=((2, 8), (7, 10)),
        occluding=(50, 100),
        visible=(60, 40),
        textured=True,
    ),
}
"""The two levels. An object of ``basic`` has one nominal size and a continuous radius."""


@dataclass(frozen=True)
class SceneObject:
    """One object; positions and radius in units of 1 / 1024 of the picture's side, ``rgb`` the colour it is painted with."""

    shape: str
    colour: str
    size: str
    pattern: str
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]

    @property
    def held_out(self) -> bool:
        """Whether its shape and colour are a pair that only ``testA`` shows."""
        return (self.shape, self.colour) in HELD_OUT


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene: objects from the back to the front, which object each pixel shows, and the background's seed.

    Shape:
        - ``owner``: ``(H, W)`` int8, the index of the visible object, -1 on the background.
    """

    objects: tuple[SceneObject, ...]
    owner: np.ndarray
    background: int
    textured: bool


def draw_scene(stream: Stream, level: Level, split: str, size: int) -> Scene:
    """Draw a scene.

    Args:
        stream: The random numbers.
        level: What it is made of.
        split: ``testA`` always holds a pair of :data:`HELD_OUT` and the others never do; ``testB`` is crowded.
        size: Side of the picture in pixels, at which visibility is judged.
    """
    crowded = split == "testB"
    fewest, most = level.counts[crowded]
    while True:
        goal = stream.between(fewest, most)
        forced = stream.below(goal) if split == "testA" else -1
        visible = level.visible[crowded] if stream.chance(level.occluding[crowded], 100) else 100
        owner = np.full((size, size), -1, dtype=np.int8)
        objects: list[SceneObject] = []
        areas: list[int] = []
        for number in range(goal):
            attributes = _draw_attributes(stream, level, objects, split == "testA" and (number == forced or stream.chance(1, 2)))
            placed = _place(stream, attributes, objects, owner, areas, visible, crowded)
            if placed is not None:
                objects.append(placed)
            elif number == forced:
                break
        else:
            if len(objects) >= fewest:
                return Scene(tuple(objects), owner, stream.bits(), level.textured)


def _draw_attributes(stream: Stream, level: Level, objects: list[SceneObject], held_out: bool) -> SceneObject:
    """An object without a place. Half of them share their shape or colour with an earlier one, so that plurals are common."""
    while True:
        shape, colour = stream.choice(level.shapes), stream.choice(level.colours)
        if objects and stream.chance(1, 2):
            other = stream.choice(objects)
            shape, colour = (other.shape, colour) if stream.chance(1, 2) else (shape, other.colour)
        if ((shape, colour) in HELD_OUT) == held_out:
            break
    size, smallest, largest = stream.choice(level.sizes)
    pattern = stream.weighted(level.patterns)
    red, green, blue = (min(max(channel + stream.between(-15, 15), 0), 255) for channel in COLOURS[colour])
    return SceneObject(shape, colour, size, pattern, 0, 0, stream.between(smallest, largest), (red, green, blue))


def _place(
    stream: Stream,
    new: SceneObject,
    objects: list[SceneObject],
    owner: np.ndarray,
    areas: list[int],
    visible: int,
    crowded: bool,
) -> SceneObject | None:
    """Find a place in front of the others that leaves ``visible`` percent of each; writes ``owner`` and ``areas``."""
    low, high = new.radius + _GAP, UNITS - new.radius - _GAP
    for _ in range(_TRIES):
        x, y = stream.between(low, high), stream.between(low, high)
        if visible == 100:
            if any(max(abs(x - o.x), abs(y - o.y)) < new.radius + o.radius + _GAP for o in objects):
                continue
        elif crowded and objects and stream.chance(2, 3):  # beside or over another object
            other = stream.choice(objects)
            reach = other.radius + new.radius
            x = min(max(other.x + stream.between(-reach, reach), low), high)
            y = min(max(other.y + stream.between(-reach, reach), low), high)
        window, inside = draw_shape(new.shape, x, y, new.radius, owner.shape[0])
        hidden = np.bincount(owner[window][inside] + 1, minlength=len(objects) + 1)[1:]
        left = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:] - hidden if hidden.any() else areas
        if any(100 * int(now) < visible * area for now, area in zip(left, areas, strict=True)):
            continue
        owner[window][inside] = len(objects)
        areas.append(int(inside.sum()))
        return SceneObject(new.shape, new.colour, new.size, new.pattern, x, y, new.radius, new.rgb)
    return None


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Paint a scene.

    Shape:
        - returns the picture ``(H, W, 3)`` uint8 and the visible part of each object ``(N, H, W)`` bool.
    """
    size = scene.owner.shape[0]
    stream = Stream(scene.background)
    image = np.empty((size, size, 3), dtype=np.uint8)
    image[:] = _background(stream, size) if scene.textured else _tint(stream)
    for thing in scene.objects:
        window, inside = draw_shape(thing.shape, thing.x, thing.y, thing.radius, size)
        paint(image, window, inside, thing.rgb, thing.pattern)
    if scene.textured:
        grain = (noise(stream.bits(), image.shape) >> np.uint64(60)).astype(np.int16) - 8
        image = np.clip(image + grain, 0, 255).astype(np.uint8)
    masks = scene.owner == np.arange(len(scene.objects), dtype=np.int8)[:, None, None]
    return image, masks


def _tint(stream: Stream) -> np.ndarray:
    """A grey with a slight tint, different from every object's colour."""
    grey = stream.between(100, 160)
    return np.array([grey + stream.between(-10, 10) for _ in range(3)], dtype=np.int16)


def _background(stream: Stream, size: int) -> np.ndarray:
    """Blocks, a slope or bands of a tinted grey, ``(H, W, 3)`` int16."""
    tint, kind = _tint(stream) - 20, stream.below(3)
    rows, columns = np.arange(size)[:, None], np.arange(size)[None, :]
    depth = stream.between(12, 28)
    if kind == 0:
        cell = max(size * stream.between(3, 8) // 64, 1)
        coarse = noise(stream.bits(), (-(-size // cell), -(-size // cell))) >> np.uint64(40)
        value = (coarse % np.uint64(2 * depth)).astype(np.int16)[rows // cell, columns // cell] - depth
    elif kind == 1:
        a, b = stream.between(-4, 4), stream.between(-4, 4)
        value = (a * (2 * rows - size) + b * (2 * columns - size)) * depth // (4 * size)
    else:
        period = max(size * stream.between(8, 20) // 64, 2)
        a, b = stream.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
        value = np.where((a * rows + b * columns) % period * 2 < period, depth // 2, -depth // 2)
    return np.asarray(tint + value[:, :, None], dtype=np.int16)
