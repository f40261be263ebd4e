"""Expressions for synthetic scenes: templates that say something and know what it means there, or that it would be unclear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import NamedTuple

from gresbox.data.grammar import COUNTS, Noun, draw_noun
from gresbox.data.randomness import Stream
from gresbox.data.scenes import Level, Scene
from gresbox.data.shapes import UNITS

__all__ = ["CLEAR", "HALF", "KINDS", "Expression", "Template", "draw_expression", "draw_template"]

KINDS = ("zero", "one", "many")

CLEAR = UNITS // 8
"""How much further left (right, above, below, nearer) a centre must be before that is said."""

HALF = UNITS // 16
"""How far from the middle every centre that is meant must be before a half of the picture is named."""

_SIDES = (("left", "x", 1), ("right", "x", -1), ("top", "y", 1), ("bottom", "y", -1))
_RELATIONS = (
    (("left of", "to the left of"), "x", 1),
    (("right of", "to the right of"), "x", -1),
    (("above",), "y", 1),
    (("below",), "y", -1),
)


@dataclass(frozen=True)
class Expression:
    """Words, the indices of the objects that they refer to (none: no target) and the template's name."""

    text: str
    targets: tuple[int, ...]
    template: str


class _Meaning(NamedTuple):
    """What a template says: the words, the objects meant and the descriptions that the words spell."""

    text: str
    targets: tuple[int, ...]
    nouns: tuple[Noun, ...]


def _fits(count: int, kind: str) -> bool:
    return {"zero": count == 0, "one": count == 1, "many": count >= 2}[kind]


def _attribute(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the red circle": exactly one object fits."""
    noun = draw_noun(stream, scene, level, absent=kind == "zero")
    return _Meaning(noun.said(stream), noun.matches(scene), (noun,))


def _plural(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "all the circles": at least two objects fit."""
    noun = draw_noun(stream, scene, level, absent=kind == "zero")
    return _Meaning(noun.said(stream, plural=True), noun.matches(scene), (noun,))


def _conjunction(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the red circle and the blue square": both are there and different, or neither is."""
    nouns = [draw_noun(stream, scene, level, absent=kind == "zero") for _ in range(2)]
    first, second = (noun.matches(scene) for noun in nouns)
    if kind == "zero":
        plurals = [level.textured and stream.chance(1, 4) for _ in range(2)]
        clear = replace(nouns[0], generic="thing") != replace(nouns[1], generic="thing")
    else:
        plurals = [len(found) > 1 for found in (first, second)]
        clear = bool(first and second) and not set(first) & set(second) and (level.textured or not any(plurals))
    texts = [f"the {noun.text(plural)}" for noun, plural in zip(nouns, plurals, strict=True)]
    return _Meaning(" and ".join(texts), tuple(sorted(first + second)), tuple(nouns)) if clear else None


def _end(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the leftmost circle": of at least two, one is further out than all others by :data:`CLEAR`."""
    noun = _place_noun(stream, scene, level, kind)
    side, axis, sign = stream.choice(_SIDES)
    where = f"on the far {side}" if axis == "x" else f"at the very {side}"
    text = stream.weighted(((f"the {side}most {noun.text()}", 2), (f"the {noun.text()} {where}", 1)))
    found = noun.matches(scene)
    if kind == "zero":
        return _Meaning(text, found, (noun,))
    ordered = sorted(found, key=lambda index: sign * getattr(scene.objects[index], axis))
    if len(ordered) < 2:
        return None
    first, second = (getattr(scene.objects[index], axis) for index in ordered[:2])
    return _Meaning(text, (ordered[0],), (noun,)) if sign * (second - first) >= CLEAR else None


def _half(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the circle on the left": all that fit lie clearly in one half, those in the named half are meant."""
    absent = kind == "zero" and (not level.textured or stream.chance(1, 2))
    noun = _place_noun(stream, scene, level, "zero" if absent else kind)
    side, axis, sign = stream.choice(_SIDES)
    where = f"on the {side}" if axis == "x" else f"at the {side}"
    plural = kind == "many" or (kind == "zero" and level.textured and stream.chance(1, 3))
    text = f"{stream.choice(('all the', 'the')) if plural else 'the'} {noun.text(plural)} {where}"
    found = noun.matches(scene)
    if absent:
        return _Meaning(text, found, (noun,))
    if not found or (len(found) < 2 and not level.textured):
        return None
    offsets = {index: sign * (UNITS // 2 - getattr(scene.objects[index], axis)) for index in found}
    if any(abs(offset) < HALF for offset in offsets.values()):
        return None
    return _Meaning(text, tuple(index for index in found if offsets[index] > 0), (noun,))


def _place_noun(stream: Stream, scene: Scene, level: Level, kind: str) -> Noun:
    """A noun for an expression of place: in a third of the cases only "object"."""
    if kind != "zero" and stream.chance(1, 3):
        return Noun(generic=stream.choice(("thing", "object")))
    return draw_noun(stream, scene, level, absent=kind == "zero")


def _count(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the two red circles": exactly two fit; another number of them is no target."""
    noun = draw_noun(stream, scene, level, absent=kind == "zero" and stream.chance(1, 4))
    found = noun.matches(scene)
    number = stream.between(2, 4) if kind == "zero" else len(found)
    if number not in COUNTS:
        return None
    start = stream.choice(("the ", "the ", "all " if number > 2 else "the ", ""))
    text = f"{start}{COUNTS[number]} {noun.text(plural=True)}"
    return _Meaning(text, found if len(found) == number else (), (noun,))


def _relation(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the circle left of the red square": one anchor, and every candidate is clearly so placed or clearly not."""
    absent = kind == "zero" and stream.chance(1, 4)
    subject, anchor = draw_noun(stream, scene, level), draw_noun(stream, scene, level, absent=absent)
    wordings, axis, sign = stream.choice(_RELATIONS)
    plural = kind == "many" or (kind == "zero" and stream.chance(1, 3))
    article = stream.choice(("all the", "the")) if plural else "the"
    text = f"{article} {subject.text(plural)} {stream.choice(wordings)} the {anchor.text()}"
    anchors = anchor.matches(scene)
    if absent:
        return _Meaning(text, anchors, (subject, anchor))
    if len(anchors) != 1:
        return None
    origin = getattr(scene.objects[anchors[0]], axis)
    found = [index for index in subject.matches(scene) if index != anchors[0]]
    ahead = {index: sign * (origin - getattr(scene.objects[index], axis)) for index in found}
    if not found or any(0 < distance < CLEAR for distance in ahead.values()):
        return None
    return _Meaning(text, tuple(index for index in found if ahead[index] >= CLEAR), (subject, anchor))


def _nearest(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the circle closest to the red square": of at least two, one is nearer than all others by :data:`CLEAR`."""
    zero = kind == "zero"
    subject, anchor = draw_noun(stream, scene, level), draw_noun(stream, scene, level, absent=zero)
    text = f"the {subject.text()} {stream.choice(('closest to', 'nearest to'))} the {anchor.text()}"
    anchors = anchor.matches(scene)
    if zero:
        return _Meaning(text, anchors, (subject, anchor))
    if len(anchors) != 1:
        return None
    origin = scene.objects[anchors[0]]
    things = [(index, scene.objects[index]) for index in subject.matches(scene) if index != anchors[0]]
    ordered = sorted((isqrt((thing.x - origin.x) ** 2 + (thing.y - origin.y) ** 2), index) for index, thing in things)
    if len(ordered) < 2 or ordered[1][0] - ordered[0][0] < CLEAR:
        return None
    return _Meaning(text, (ordered[0][1],), (subject, anchor))


def _except(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "all the circles except the red one": at least two remain."""
    exception = draw_noun(stream, scene, level, absent=kind == "zero")
    but = stream.choice(("except", "but"))
    found = exception.matches(scene)
    if kind == "many" and exception.shape and stream.chance(1, 3):
        if len(found) != 1:
            return None
        rest = tuple(index for index in range(len(scene.objects)) if index not in found)
        return _Meaning(f"everything {but} the {exception.text()}", rest, (exception,))
    if not exception.shape or not (exception.colour or exception.size or exception.pattern):
        return None
    base = Noun(shape=exception.shape)
    all_of_it = base.matches(scene)
    if kind == "zero":
        one, found = stream.choice(("one", "ones")), all_of_it
    elif not found:
        return None
    else:
        one = "one" if len(found) == 1 else "ones"
    which = exception.text().removesuffix(exception.shape) + one
    start = stream.choice((f"all the {base.text(plural=True)}", f"every {base.text()}"))
    rest = tuple(index for index in all_of_it if kind == "zero" or index not in found)
    return _Meaning(f"{start} {but} the {which}", rest, (exception,))


def _negation(stream: Stream, scene: Scene, level: Level, kind: str) -> _Meaning | None:
    """Say "the circle that is not red": objects of the shape without the attribute; there is one with it, too."""
    noun = draw_noun(stream, scene, level)
    value = noun.colour or noun.pattern or noun.size
    if not noun.shape or sum(map(bool, (noun.colour, noun.pattern, noun.size))) != 1:
        return None
    plural = kind == "many" or (kind == "zero" and stream.chance(1, 3))
    text = f"the {Noun(shape=noun.shape).text(plural)} that {'are' if plural else 'is'} not {value}"
    found = noun.matches(scene)
    rest = tuple(index for index in Noun(shape=noun.shape).matches(scene) if index not in found)
    return _Meaning(text, rest, (noun,))


Template = Callable[[Stream, Scene, Level, str], _Meaning | None]
_BASIC: dict[str, tuple[tuple[Template, int], ...]] = {
    "zero": ((_attribute, 50), (_plural, 25), (_conjunction, 10), (_end, 10), (_half, 5)),
    "one": ((_attribute, 65), (_end, 20), (_half, 15)),
    "many": ((_plural, 55), (_conjunction, 45)),
}
_FULL: dict[str, tuple[tuple[Template, int], ...]] = {
    "zero": (
        (_attribute, 20),
        (_plural, 10),
        (_conjunction, 8),
        (_end, 6),
        (_half, 10),
        (_count, 12),
        (_relation, 22),
        (_nearest, 4),
        (_except, 3),
        (_negation, 5),
    ),
    "one": ((_attribute, 35), (_end, 15), (_half, 13), (_relation, 22), (_nearest, 10), (_negation, 5)),
    "many": ((_plural, 25), (_conjunction, 22), (_half, 10), (_count, 15), (_relation, 13), (_except, 10), (_negation, 5)),
}


def draw_expression(stream: Stream, scene: Scene, level: Level, kind: str, template: Template, split: str) -> Expression | None:
    """Let a template say something about a scene, and check it.

    Args:
        stream: The random numbers.
        scene: The scene.
        level: Its level.
        kind: How many objects must be meant: ``"zero"``, ``"one"`` or ``"many"``.
        template: One of the templates of :func:`draw_template`.
        split: Only ``testA`` may name held-out pairs, and all its targets hold one.

    Returns:
        The expression; None when this attempt would be false, unclear or of another kind.
    """
    said = template(stream, scene, level, kind)
    if said is None or not _fits(len(said.targets), kind):
        return None
    if split == "testA":
        if said.targets and not any(scene.objects[index].held_out for index in said.targets):
            return None
    elif any(noun.held_out for noun in said.nouns):
        return None
    return Expression(said.text, said.targets, template.__name__[1:])


def draw_template(stream: Stream, level: Level, kind: str) -> Template:
    """Draw the template for an expression of a kind, at the level's proportions."""
    return stream.weighted((_FULL if level.textured else _BASIC)[kind])
