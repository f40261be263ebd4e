"""What the datasets of released files share: one sample per sentence, with the instances that it refers to."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gresbox._checks import check_choice, check_range
from gresbox.data.catalogue import Benchmark
from gresbox.data.folders import PICTURE_FOLDERS, DatasetFiles, find_pictures
from gresbox.data.masks import rasterise_polygons, resize_nearest, segmentation_mask
from gresbox.data.references import Index, Reference, index_references, paused_collection, read_instances, read_references
from gresbox.structures import GresSample, GresTarget

__all__ = ["ReferringDataset", "SampleInfo"]


class SampleInfo(NamedTuple):
    """What is known of a sample without its picture and masks; ``size`` is that of its truth, height and width in pixels."""

    text: str
    image_id: int
    ref_id: int
    sent_id: int
    kind: str
    exists: bool
    size: tuple[int, int]


class ReferringDataset(Dataset[GresSample]):
    """A split of a benchmark in its released files; the base of :class:`GRefCOCO` and its relatives, which name the files.

    Args:
        benchmark: Whose rules to follow.
        files: Where its files are.
        split: Which references.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` or the cleaned ``"sent"``.
        images: Where the pictures are. True: below the root; a folder: there, or in COCO's folders in it. False: they are not
            read, only :meth:`target`, :meth:`text` and :meth:`info` are needed, as for scoring ready predictions.
        size: Side of the square that picture and truth are brought to, as the benchmark's own code does it for scoring; None: the
            picture's own size.
        exclude_images: Ids of pictures to leave out, against leakage; see :func:`gresbox.data.held_out_images`.
    """

    _who: ClassVar[str] = "ReferringDataset"

    def __init__(
        self,
        benchmark: Benchmark,
        files: DatasetFiles,
        split: str,
        *,
        transform: Callable[[GresSample], Any] | None = None,
        sentence: str = "raw",
        images: bool | str | os.PathLike[str] = True,
        size: int | None = None,
        exclude_images: Iterable[int] = (),
    ) -> None:
        who = self._who
        check_choice(who, "sentence", sentence, ("raw", "sent"))
        if size is not None:
            check_range(who, "size", size, 1)
        self.root, self.split, self.transform, self.size = files.root, split, transform, size
        self.benchmark, self.files = benchmark, files
        with paused_collection():  # what is read and not kept is given back inside
            index = self._read(sentence, frozenset(exclude_images))
        self._index = index
        self._folders = self._find_pictures(images)
        if index.warning(who):
            warnings.warn(index.warning(who), stacklevel=3)  # whoever makes a dataset of a subclass

    def _read(self, sentence: str, excluded: frozenset[int]) -> Index:
        references = self.benchmark.select(self._who, read_references(self._who, self.files.references), self.split)
        instances = read_instances(self._who, self.files.instances)
        return index_references(self._who, self.benchmark, references, instances, sentence, excluded)

    def __len__(self) -> int:
        return len(self._index.texts)

    def __getitem__(self, index: int) -> GresSample:
        info = self.info(index)
        sample = GresSample(
            image=self._read_picture(info.image_id),
            text=info.text,
            target=self.target(index),
            image_id=info.image_id,
            ref_id=info.ref_id,
            sent_id=info.sent_id,
            kind=info.kind,
            exists=info.exists,
        )
        return sample if self.transform is None else self.transform(sample)

    def target(self, index: int) -> GresTarget:
        """The truth of sample ``index`` alone, without reading its picture.

        Args:
            index: As for ``[index]``.
        """
        index = self._checked(index)
        reference = self._index.references[self._index.owners[index]]
        return self._target(reference, reference.segmentations if self._index.exists[index] else ())

    def text(self, index: int) -> str:
        """The expression of sample ``index`` alone.

        Args:
            index: As for ``[index]``.
        """
        return self._index.texts[self._checked(index)]

    def info(self, index: int) -> SampleInfo:
        """What is known of sample ``index`` without reading a picture or making a mask.

        Args:
            index: As for ``[index]``.
        """
        index = self._checked(index)
        reference = self._index.references[self._index.owners[index]]
        picture, exists = self._index.pictures[reference.image_id], self._index.exists[index]
        return SampleInfo(
            text=self._index.texts[index],
            image_id=reference.image_id,
            ref_id=reference.ref_id,
            sent_id=self._index.sent_ids[index],
            kind=reference.kind if exists else "zero",
            exists=exists and reference.kind != "zero",
            size=(picture.height, picture.width) if self.size is None else (self.size, self.size),
        )

    @property
    def image_ids(self) -> frozenset[int]:
        """The pictures of this split."""
        return frozenset(reference.image_id for reference in self._index.references)

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._who}: `index` must be below {len(self)}, got {index}.")
        return index % len(self)

    def _target(self, reference: Reference, segmentations: tuple[Any, ...]) -> GresTarget:
        picture = self._index.pictures[reference.image_id]
        height, width = (picture.height, picture.width) if self.size is None else (self.size, self.size)
        masks = np.zeros((len(segmentations), height, width), dtype=bool)
        for mask, segmentation in zip(masks, segmentations, strict=True):
            try:
                mask |= self._mask(segmentation, picture.height, picture.width)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._who}: reference {reference.ref_id} has a segmentation that cannot be read: {error}"
                ) from None
        return GresTarget(torch.from_numpy(masks))

    def _mask(self, segmentation: Any, height: int, width: int) -> np.ndarray:
        if isinstance(segmentation, bytes):
            segmentation = json.loads(segmentation)
        if self.size is None:
            return segmentation_mask(segmentation, height, width)
        if self.benchmark.scales_polygons and isinstance(segmentation, list):
            scale = (self.size / width, self.size / height)
            parts = [[number * scale[place % 2] for place, number in enumerate(part)] for part in segmentation]
            return rasterise_polygons(parts, self.size, self.size)
        return resize_nearest(segmentation_mask(segmentation, height, width), (self.size, self.size))

    def _read_picture(self, image_id: int) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        name, height, width = self._index.pictures[image_id]
        if self._folders is None:
            raise RuntimeError(f"{self._who}: pictures were switched off by images=False; use target(index) and text(index).")
        path = self._folders[name] / name
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise type(error)(f"{self._who}: {path} is not a readable picture ({error}).") from None
        if picture.size != (width, height):
            raise ValueError(
                f"{self._who}: {path} must be {height} x {width} as in instances.json, got {(picture.height, picture.width)}."
            )
        if self.size is not None:
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def _find_pictures(self, images: bool | str | os.PathLike[str]) -> dict[str, Path] | None:
        """The folder of each picture; all that are needed must be there."""
        if images is False:
            return None
        names = {picture.name for picture in self._index.pictures.values()}
        found, searched, missing = find_pictures(self.files, names, None if images is True else images)
        if missing and not searched:
            if images is True:
                where = f"`root` must hold the pictures in one of {', '.join(PICTURE_FOLDERS[:4])}"
                raise FileNotFoundError(f"{self._who}: {where}, got none of these folders in {self.root}.")
            raise FileNotFoundError(f"{self._who}: `images` must be a folder of pictures, got {images}, which is none.")
        if missing:
            places = ", ".join(map(str, searched))
            raise FileNotFoundError(
                f"{self._who}: {len(missing)} of {len(names)} pictures are missing in {places}, for example {min(missing)}."
            )
        return found
