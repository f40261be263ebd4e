"""Flip a sample left to right, words included."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from gresbox._checks import check_range
from gresbox.structures import GresSample, GresTarget

__all__ = ["HorizontalFlip", "swap_sides"]

_SIDES = {"left": "right", "right": "left"}
_ENDINGS = "|".join(("most", "est", "hand", "handed", "ward", "wards", "side"))
_SIDE = re.compile(rf"(?<!\w)(left|right)(?=(?:{_ENDINGS})?(?!\w))", re.IGNORECASE)


def swap_sides(text: str) -> str:
    """Say left for right and right for left, as words: "bright" and "leftover" stay.

    Words of both are swapped, too: "leftmost", "right-hand", "rightward", "leftside". What else a word could mean is not known:
    "right" for "correct" is swapped as well.

    Args:
        text: An expression.

    Example:
        >>> swap_sides("Left dog, the bright one right of the rightmost cat")
        'Right dog, the bright one left of the leftmost cat'
    """

    def other(match: re.Match[str]) -> str:
        word = match[1]
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


@dataclass(frozen=True)
class HorizontalFlip:
    """Flip samples left to right: picture, masks, boxes and the words for the sides. A transform; nothing uses it by default.

    Args:
        probability: Share of the samples that are flipped, in [0, 1].
        generator: Draws which; default: PyTorch's global generator, which data workers seed.

    Raises:
        ValueError: If the probability is out of range.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> sample = SyntheticGRES("val", 1)[0]
        >>> flip = HorizontalFlip(1.0)
        >>> bool((flip(sample).image == sample.image.flip(-1)).all()), flip(flip(sample)).text == sample.text
        (True, True)
    """

    probability: float = 0.5
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_range("HorizontalFlip", "probability", self.probability, 0, 1)

    def __call__(self, sample: GresSample) -> GresSample:
        if torch.rand((), generator=self.generator) >= self.probability:
            return sample
        target = sample.target
        assert target.merged is not None
        assert target.boxes is not None
        boxes = target.boxes.clone()
        some = boxes[:, 2:].any(-1)  # an empty mask's box is 0, 0, 0, 0 and stays
        boxes[some, 0] = 1 - boxes[some, 0]
        flipped = GresTarget(target.masks.flip(-1), boxes, merged=target.merged.flip(-1), no_target=target.no_target)
        return replace(sample, image=sample.image.flip(-1), text=swap_sides(sample.text), target=flipped)
