"""A synthetic benchmark of generalised referring segmentation: exact masks, exact truth, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from gresbox._checks import check_choice, check_range
from gresbox.data.expressions import KINDS, Expression, draw_expression, draw_template
from gresbox.data.randomness import Stream
from gresbox.data.scenes import LEVELS, SPLITS, Scene, draw_scene, render
from gresbox.structures import GresSample, GresTarget

__all__ = ["SyntheticGRES"]

_TRIES_PER_SCENE = 12
_SCENES_PER_TEMPLATE = 8
_IDS_PER_SPLIT = 10**9
_PARTS = 10**6  # proportions are counted in millionths, so that no rounding of floats decides a sample


class SyntheticGRES(Dataset[GresSample]):
    """Pictures of coloured shapes with referring expressions, drawn on demand.

    Sample ``i`` depends on the arguments and ``i`` alone and is the same bytes on every platform: scenes and pictures are made by
    integer arithmetic from a hash, so any sample can be had at once and a larger ``size`` continues a smaller one.

    An expression is drawn together with its truth and kept only where that is exact and unambiguous: "the red circle" where one
    object fits, a place or a relation where every candidate is clearly so placed or clearly not (by an eighth of the picture), a
    half of the picture where nothing that fits is near the middle. "The two circles" is no target where there are three.

    Level ``"basic"``: 2 to 5 separate objects, 4 shapes, 6 colours; attributes, plurals, conjunctions, places; no target by absent
    attributes. Level ``"full"``: 2 to 8 objects, half of the scenes with occlusion (at least 60 % of every object stays visible), 6
    shapes, 8 colours, 2 sizes, 3 patterns, textured backgrounds; also counts, relations, exclusion, and no target by an absent
    relation, place or a wrong count. Masks are the visible parts; places are those of the whole object's centre.

    Splits: ``"train"``, ``"val"``; ``"testA"``: every picture holds, and every target contains, a pair of shape and colour that the
    other splits neither show nor name; ``"testB"``: more objects (5 to 8, ``full`` 7 to 10), all with occlusion (at least 50 % of
    every object visible, ``full`` 40 %).

    Args:
        split: ``"train"``, ``"val"``, ``"testA"`` or ``"testB"``.
        size: Number of samples.
        level: ``"basic"`` or ``"full"``.
        image_size: Side of the square pictures, in pixels.
        seed: Another benchmark of the same kind.
        proportions: Shares of expressions with no, one and many targets.
        transform: Applied to every sample.

    Shape:
        - ``[i].image``: ``(3, image_size, image_size)`` uint8; ``[i].target.masks``: ``(M, image_size, image_size)`` bool.

    Raises:
        ValueError: If an argument is out of range.
        IndexError: If there is no sample ``i``.

    Example:
        >>> data = SyntheticGRES("val", 100)
        >>> sample = data[0]
        >>> tuple(sample.image.shape), sample.kind in ("zero", "one", "many")
        ((3, 64, 64), True)
        >>> (data[7].image == SyntheticGRES("val", 8)[7].image).all().item()
        True
    """

    def __init__(
        self,
        split: str,
        size: int,
        *,
        level: str = "basic",
        image_size: int = 64,
        seed: int = 0,
        proportions: tuple[float, float, float] = (0.15, 0.5, 0.35),
        transform: Callable[[GresSample], Any] | None = None,
    ) -> None:
        check_choice("SyntheticGRES", "split", split, SPLITS)
        check_choice("SyntheticGRES", "level", level, tuple(LEVELS))
        check_range("SyntheticGRES", "size", size, 0, _IDS_PER_SPLIT - 1)
        check_range("SyntheticGRES", "image_size", image_size, 32, 4096)
        if len(proportions) != 3 or not all(share >= 0 for share in proportions) or abs(sum(proportions) - 1) > 1e-6:
            raise ValueError(f"SyntheticGRES: `proportions` must be three shares that sum to 1, got {proportions}.")
        self.split, self.size, self.level, self.image_size, self.seed = split, size, level, image_size, seed
        self.proportions, self.transform = tuple(proportions), transform
        self._weights = tuple(zip(KINDS, (round(share * _PARTS) for share in proportions), strict=True))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> GresSample:
        index = self._checked(index)
        scene, expression = self.scene(index)
        image, visible = render(scene)
        number = self.number(index)
        sample = GresSample(
            image=torch.from_numpy(image.transpose(2, 0, 1).copy()),
            text=expression.text,
            target=GresTarget(torch.from_numpy(visible[list(expression.targets)])),
            image_id=number,
            ref_id=number,
            sent_id=number,
            kind=KINDS[min(len(expression.targets), 2)],
            exists=bool(expression.targets),
        )
        return sample if self.transform is None else self.transform(sample)

    def scene(self, index: int) -> tuple[Scene, Expression]:
        """The objects behind sample ``index``, and what its expression means.

        Args:
            index: As for ``[index]``.
        """
        index = self._checked(index)
        level = LEVELS[self.level]
        stream = Stream(self.seed, SPLITS.index(self.split), tuple(LEVELS).index(self.level), index)
        kind = stream.weighted(self._weights)
        while True:
            template = draw_template(stream, level, kind)
            for _ in range(_SCENES_PER_TEMPLATE):
                scene = draw_scene(stream, level, self.split, self.image_size)
                for _ in range(_TRIES_PER_SCENE):
                    expression = draw_expression(stream, scene, level, kind, template, self.split)
                    if expression is not None:
                        return scene, expression

    def number(self, index: int) -> int:
        """The id of sample ``index``: of its picture, reference and sentence; different in all splits.

        Args:
            index: As for ``[index]``.
        """
        return SPLITS.index(self.split) * _IDS_PER_SPLIT + self._checked(index) + 1

    def _checked(self, index: int) -> int:
        if not -self.size <= index < self.size:
            raise IndexError(f"SyntheticGRES: `index` must be below {self.size}, got {index}.")
        return index % self.size
