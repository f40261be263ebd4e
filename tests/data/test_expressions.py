"""The truth of the synthetic expressions, found again from the words and the list of objects by other code."""

import re
from collections import Counter

import pytest

from gresbox.data import SyntheticGRES
from gresbox.data.scenes import HELD_OUT

COLOURS = {"red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "star": "stars", "ring": "rings"}
GENERIC = {"thing": "things", "object": "objects", "one": "ones"}
SINGULAR = {plural: word for word, plural in (SHAPES | GENERIC).items()}
SIZES, PATTERNS = {"small", "large"}, {"plain", "striped", "checkered"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
EIGHTH, SIXTEENTH = 128, 64


class UnclearError(Exception):
    """The words do not say exactly what is meant."""


def need(condition):
    if not condition:
        raise UnclearError


def noun(words, objects):
    """Objects that meet a description, whether it is plural, and the pairs of shape and colour that it names."""
    wanted, plural, tail = {}, False, None
    if "that" in words:
        tail = words[words.index("that") :]
        words = words[: words.index("that")]
    for word in words:
        if word in COLOURS:
            wanted["colour"] = word
        elif word in SIZES:
            wanted["size"] = word
        elif word in PATTERNS:
            wanted["pattern"] = word
        else:
            plural = word in SINGULAR
            word = SINGULAR.get(word, word)
            assert word in SHAPES or word in GENERIC, words
            if word in SHAPES:
                wanted["shape"] = word
    if tail and tail[2:3] == ["not"]:
        value = tail[3]
        found = {o for o in objects if o.shape == wanted["shape"]}
        need(any(value in (o.colour, o.size, o.pattern) for o in found))
        named = {(wanted["shape"], value)}
        return {o for o in found if value not in (o.colour, o.size, o.pattern)}, plural, named
    if tail:
        wanted["colour"] = tail[2]
    named = {(wanted.get("shape"), wanted.get("colour"))}
    return {o for o in objects if all(getattr(o, key) == value for key, value in wanted.items())}, plural, named


def strip_article(words):
    every = words[0] == "every"
    while words[0] in ("the", "all", "every"):
        words = words[1:]
    return words, every


def number_agrees(found, plural):
    need(len(found) != 1 if plural else len(found) <= 1)


def ahead(o, anchor, side):
    axis, sign = {"left": ("x", 1), "right": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[side]
    return sign * (getattr(anchor, axis) - getattr(o, axis))


def relation(subject, side, anchor, objects):
    words, _ = strip_article(subject.split())
    found, plural, named = noun(words, objects)
    anchors, anchor_plural, more = noun(anchor.split(), objects)
    named |= more
    assert not anchor_plural
    if not anchors:
        return set(), named
    need(len(anchors) == 1)
    origin = next(iter(anchors))
    found -= anchors
    if side in ("closest", "nearest"):
        distance = sorted(((o.x - origin.x) ** 2 + (o.y - origin.y) ** 2) ** 0.5 for o in found)
        need(len(found) >= 2)
        need(distance[1] - distance[0] > EIGHTH - 1)
        return {min(found, key=lambda o: (o.x - origin.x) ** 2 + (o.y - origin.y) ** 2)}, named
    need(found)
    need(all(not 0 < ahead(o, origin, side) < EIGHTH for o in found))
    found = {o for o in found if ahead(o, origin, side) > 0}
    number_agrees(found, plural)
    return found, named


def place(words, objects, side, extreme):
    words, _ = strip_article(words)
    found, plural, named = noun(words, objects)
    axis, sign = {"left": ("x", 1), "right": ("x", -1), "top": ("y", 1), "bottom": ("y", -1)}[side]
    if not found:
        return found, named
    if extreme:
        assert not plural
        ordered = sorted(found, key=lambda o: sign * getattr(o, axis))
        need(len(ordered) > 1)
        need(sign * (getattr(ordered[1], axis) - getattr(ordered[0], axis)) >= EIGHTH)
        return {ordered[0]}, named
    need(all(abs(getattr(o, axis) - 512) >= SIXTEENTH for o in found))
    found = {o for o in found if sign * (512 - getattr(o, axis)) > 0}
    number_agrees(found, plural)
    return found, named


def meaning(text, objects):
    """The objects meant, and the pairs of shape and colour that are named."""
    objects = set(objects)
    words = text.split()
    if match := re.fullmatch(r"everything (?:except|but) the (.*)", text):
        found, plural, named = noun(match[1].split(), objects)
        need(len(found) == 1)
        assert not plural
        return objects - found, named
    if match := re.fullmatch(r"(?:all the|every) (\w+) (?:except|but) the (.*)", text):
        base, _, _ = noun([match[1]], objects)
        shape = SINGULAR.get(match[1], match[1])
        exception, plural, _ = noun(match[2].split(), base)
        named = {(shape, colour) for colour in COLOURS & set(match[2].split())}
        if base:
            need(len(exception) >= 2 if plural else len(exception) == 1)
            need(len(base - exception) >= 2)
        return base - exception, named
    if " and " in text:
        halves = [noun(strip_article(half.split())[0], objects) for half in text.split(" and ")]
        (first, a, named), (second, b, more) = halves
        need(bool(first) == bool(second))
        need(not first & second)
        number_agrees(first, a)
        number_agrees(second, b)
        return first | second, named | more
    relations = r"(.*?) (?:to the )?(left|right|above|below|closest|nearest)(?: of| to)? the (.*)"
    if (match := re.fullmatch(relations, text)) and " on the " not in text and " at the " not in text:
        return relation(match[1], match[2], match[3], objects)
    if match := re.fullmatch(r"(.*) (?:on|at) the (far |very )?(left|right|top|bottom)", text):
        return place(match[1].split(), objects, match[3], bool(match[2]))
    if match := re.fullmatch(r"the (left|right|top|bottom)most (.*)", text):
        return place(match[2].split(), objects, match[1], True)
    words, every = strip_article(words)
    if words[0] in NUMBERS:
        found, plural, named = noun(words[1:], objects)
        assert plural
        return (found if len(found) == NUMBERS[words[0]] else set()), named
    found, plural, named = noun(words, objects)
    number_agrees(found, plural or every)
    return found, named


@pytest.mark.parametrize("level", ["basic", "full"])
@pytest.mark.parametrize("split", ["train", "testA", "testB"])
def test_every_expression_means_exactly_its_targets(level, split):
    data = SyntheticGRES(split, 1000, level=level, seed=1)
    for index in range(len(data)):
        scene, expression = data.scene(index)
        found, named = meaning(expression.text, scene.objects)
        assert found == {scene.objects[place] for place in expression.targets}, (index, expression)
        if split == "testA":
            assert not found or any((o.shape, o.colour) in HELD_OUT for o in found)
        else:
            assert not named & HELD_OUT, (index, expression)


def test_the_check_can_fail():
    data = SyntheticGRES("train", 200, level="full", seed=1)
    wrong = 0
    for index in range(len(data)):
        expression, other = data.scene(index)[1], data.scene((index + 1) % len(data))[0]
        try:
            wrong += not meaning(expression.text, other.objects)[0]
        except UnclearError:
            wrong += 1
    assert wrong > 50


def test_every_kind_of_expression_occurs():
    counts = Counter()
    data = SyntheticGRES("train", 1500, level="full")
    for index in range(len(data)):
        expression = data.scene(index)[1]
        counts[min(len(expression.targets), 2), expression.template] += 1
    one = {"attribute", "end", "half", "relation", "nearest", "negation"}
    many = {"plural", "conjunction", "half", "count", "relation", "except", "negation"}
    assert {name for kind, name in counts if kind == 1} == one
    assert {name for kind, name in counts if kind == 2} == many
    assert {name for kind, name in counts if kind == 0} == one | many


def test_no_target_expressions_of_every_reason():
    reasons = Counter()
    data = SyntheticGRES("train", 3000, level="full", seed=2, proportions=(1, 0, 0))
    for index in range(600):
        scene, expression = data.scene(index)
        words = expression.text.split()
        if expression.template == "count":
            found, _, _ = noun([word for word in words if word not in {"the", "all", *NUMBERS}], set(scene.objects))
            reasons["wrong count" if found else "absent attribute"] += 1
        elif expression.template == "relation":
            anchor = re.split(r" (?:left|right) of the | above the | below the ", expression.text)[1]
            reasons["absent relation" if noun(anchor.split(), set(scene.objects))[0] else "absent anchor"] += 1
        else:
            reasons[expression.template] += 1
    assert min(reasons[name] for name in ("wrong count", "absent attribute", "absent relation", "absent anchor", "attribute")) >= 10
