"""The words of the synthetic expressions, and nouns: descriptions that an object meets or does not meet."""

from __future__ import annotations

from dataclasses import dataclass

from gresbox._checks import check_choice
from gresbox.data.randomness import Stream
from gresbox.data.scenes import HELD_OUT, LEVELS, Level, Scene, SceneObject

__all__ = ["COUNTS", "Noun", "draw_noun", "vocabulary"]

COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}

_PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "star": "stars",
    "ring": "rings",
    "thing": "things",
    "object": "objects",
}
_BASIC_WORDS = "the all every and that is on at far very left right top bottom leftmost rightmost topmost bottommost"
_FULL_WORDS = "of to above below closest nearest except but one ones everything are not"


def vocabulary(level: str = "full") -> tuple[str, ...]:
    """Every word that expressions of a level can hold, sorted; expressions are these words and single spaces.

    Args:
        level: ``"basic"`` or ``"full"``; the words of ``basic`` are among those of ``full``.

    Raises:
        ValueError: If there is no such level.

    Example:
        >>> words = vocabulary("basic")
        >>> len(words), words[:4]
        (36, ('all', 'and', 'at', 'blue'))
        >>> set(words) < set(vocabulary("full"))
        True
    """
    check_choice("vocabulary", "level", level, tuple(LEVELS))
    spec = LEVELS[level]
    nouns = (*spec.shapes, "thing", "object")
    words = {*nouns, *(_PLURALS[noun] for noun in nouns), *spec.colours, *_BASIC_WORDS.split()}
    if level == "full":
        words |= {*_FULL_WORDS.split(), *COUNTS.values()}
        words |= {name for name, *_ in spec.sizes} | {name for name, _ in spec.patterns}
    return tuple(sorted(words))


@dataclass(frozen=True)
class Noun:
    """A description by attributes; an attribute that is None is not said.

    Args:
        shape: Or None: "thing" or "object".
        colour: Of the surface.
        size: ``"small"`` or ``"large"``.
        pattern: Of the surface.
        generic: The word in place of a shape.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    pattern: str | None = None
    generic: str = "thing"

    def matches(self, scene: Scene) -> tuple[int, ...]:
        """The objects of a scene that meet the description."""
        return tuple(index for index, thing in enumerate(scene.objects) if self.fits(thing))

    def fits(self, thing: SceneObject) -> bool:
        """Whether an object meets the description."""
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
            and (self.pattern is None or self.pattern == thing.pattern)
        )

    @property
    def held_out(self) -> bool:
        """Whether it names a pair that only ``testA`` may name."""
        return (self.shape, self.colour) in HELD_OUT

    def text(self, plural: bool = False) -> str:
        """The words, without an article."""
        head = self.shape or self.generic
        words = (self.size, self.pattern, self.colour, _PLURALS[head] if plural else head)
        return " ".join(word for word in words if word)

    def said(self, stream: Stream, plural: bool = False) -> str:
        """The words in one of several wordings: "the red circle", "the circle that is red", "all the red circles"."""
        text = self.text(plural)
        if plural:
            return stream.weighted(
                ((f"all the {text}", 4), (f"the {text}", 3), (f"all {text}", 1), (text, 1), (f"every {self.text()}", 1))
            )
        wordings = [(f"the {text}", 8), (text, 1)]
        if self.colour and not (self.size or self.pattern):
            wordings.append((f"the {self.shape or self.generic} that is {self.colour}", 1))
        return stream.weighted(wordings)


_BASIC_FORMS = ((("shape", "colour"), 2), (("shape",), 1), (("colour",), 1))
_FULL_FORMS = (
    (("shape", "colour"), 6),
    (("shape",), 4),
    (("colour",), 4),
    (("size", "shape"), 2),
    (("pattern", "shape"), 2),
    (("size", "colour"), 1),
    (("pattern", "colour"), 1),
    (("pattern",), 1),
    (("size", "colour", "shape"), 1),
    (("pattern", "colour", "shape"), 1),
    (("size", "pattern", "shape"), 1),
)


def draw_noun(stream: Stream, scene: Scene, level: Level, *, absent: bool = False) -> Noun:
    """Draw a description: of some object of the scene, or (``absent``) of nothing in particular.

    An absent one is, at the level with patterns, in half of the cases an object's description with one attribute changed, so that
    the scene almost holds it. The caller checks what it matches.

    Args:
        stream: The random numbers.
        scene: The scene.
        level: Its level.
        absent: Draw the attributes at random.
    """
    full = level.textured
    form = stream.weighted(_FULL_FORMS if full else _BASIC_FORMS)
    thing = stream.choice(scene.objects)
    values = {name: getattr(thing, name) for name in form}
    if absent:
        every = {
            "shape": level.shapes,
            "colour": level.colours,
            "size": tuple(name for name, *_ in level.sizes),
            "pattern": tuple(name for name, _ in level.patterns),
        }
        changed = (stream.choice(form),) if full and stream.chance(1, 2) else form
        values.update({name: stream.choice(every[name]) for name in changed})
    return Noun(**values, generic=stream.choice(("thing", "object")))
