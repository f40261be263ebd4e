"""Turn COCO-style instances and expressions of one's own into gRefCOCO's layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gresbox.data.layout import make_folder
from gresbox.data.masks import check_rle, segmentation_mask
from gresbox.data.references import read_instances, usable_segmentation

__all__ = ["convert_coco"]

_WHO = "convert_coco"
_KEYS = ("text", "ann_ids", "image_id", "file_name", "split")


def convert_coco(
    instances: str | os.PathLike[str],
    expressions: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    images: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    link: bool = False,
) -> Path:
    """Write one's own data in gRefCOCO's layout, so that :class:`GRefCOCO` and any program for gRefCOCO reads it.

    An expression is a record ``{"text": "the two dogs", "ann_ids": [3, 8], "split": "train"}``. ``text`` may be a list of several
    sentences that mean the same. ``ann_ids`` are ids of annotations of one picture; none (``[]``) means no target, and the picture
    is then named by ``"image_id"`` or ``"file_name"``, which may also stand beside targets. ``split`` is ``"train"`` if it is left
    out. Everything is checked before anything is written, and the folder appears complete or not at all.

    Args:
        instances: JSON file with COCO's ``images``, ``annotations`` (polygons or run-length encodings) and ``categories``.
        expressions: The records, or a file of them: JSON lines, or one JSON list.
        images: Folder that the pictures' file names are relative to.
        out_dir: Folder to make; it must not exist or be empty.
        link: Make symbolic links to the pictures instead of copies.

    Returns:
        The folder: ``grefcoco/grefs(unc).json``, ``grefcoco/instances.json`` and ``images/train2014``.

    Raises:
        FileExistsError: If ``out_dir`` is a file or holds something.
        FileNotFoundError: If a file or a picture is missing.
        ValueError: If a record or an annotation is wrong; the message names it.

    Example:
        >>> import json, tempfile
        >>> from PIL import Image
        >>> from gresbox.data import GRefCOCO
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (16, 12)).save(f"{folder}/a.png")
        ...     square = {"id": 3, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
        ...     content = {"images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 16}], "annotations": [square]}
        ...     _ = Path(folder, "instances.json").write_text(json.dumps(content))
        ...     records = [{"text": "the square", "ann_ids": [3]}, {"text": "the dog", "ann_ids": [], "file_name": "a.png"}]
        ...     root = convert_coco(f"{folder}/instances.json", records, folder, f"{folder}/mine")
        ...     [(sample.text, sample.kind, int(sample.target.merged.sum())) for sample in GRefCOCO(root, "train")]
        [('the square', 'one', 16), ('the dog', 'zero', 0)]
    """
    known = read_instances(_WHO, _existing("instances", instances))
    records = _read_records(expressions) if isinstance(expressions, str | os.PathLike) else list(expressions)
    if not records:
        raise ValueError(f"{_WHO}: `expressions` must hold at least one record, got none.")
    conversion = _Conversion(Path(images), known.pictures, known.annotations)
    for place, record in enumerate(records, 1):
        conversion.add(place, record)
    categories = known.categories or [{"id": 1, "name": "object"}]
    return make_folder(_WHO, out_dir, lambda folder: conversion.write(folder, categories, link))


def _existing(argument: str, path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_WHO}: `{argument}` must be a file, got {path}, which is none.")
    return Path(path)


def _read_records(path: str | os.PathLike[str]) -> list[Any]:
    text = _existing("expressions", path).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{_WHO}: {path} is not JSON ({error}).") from None
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{_WHO}: line {number} of {path} is not JSON ({error}).") from None
    return records


@dataclass
class _Conversion:
    images: Path
    pictures: Mapping[int, Mapping[str, Any]]
    annotations: Mapping[int, Mapping[str, Any]]
    used: dict[int, dict[str, Any]] = field(default_factory=dict)  # what instances.json will say of each picture
    sources: dict[str, Path] = field(default_factory=dict)  # the picture behind each new name
    references: list[dict[str, Any]] = field(default_factory=list)
    sentences: int = 0

    def __post_init__(self) -> None:
        self.by_name = {str(picture.get("file_name")): number for number, picture in self.pictures.items()}

    def add(self, place: int, record: Any) -> None:
        """Check one record and keep it as a reference."""
        who = f"{_WHO}: expression {place}"
        if not isinstance(record, Mapping) or not record.keys() <= set(_KEYS):
            raise ValueError(f"{who} must be a record of {', '.join(_KEYS)}, got {_told(record)}.")
        texts = record.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{who} must have a `text` that says something, or a list of such texts.")
        split = record.get("split", "train")
        if not isinstance(split, str) or not split:
            raise ValueError(f"{who} must have a `split` that is a word, got {split!r}.")
        numbers = record.get("ann_ids")
        if not isinstance(numbers, list | tuple) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{who} must have `ann_ids`, a list of numbers that is empty for no target, got {numbers!r}.")
        image_id = self._picture_of(who, record, numbers)
        for number in numbers:
            self._check_annotation(f"{who} refers to annotation {number}", number, image_id)
        name = self.used[image_id]["file_name"]
        sentences = [self._sentence(text) for text in texts]
        self.references.append(
            {
                "ref_id": len(self.references) + 1,
                "image_id": image_id,
                "split": split,
                "ann_id": list(numbers) or [-1],
                "category_id": sorted({self.annotations[number].get("category_id", 1) for number in numbers}) or [-1],
                "no_target": not numbers,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "file_name": name,
                "sentences": sentences,
            }
        )

    def _sentence(self, text: str) -> dict[str, Any]:
        self.sentences += 1
        cleaned = " ".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split()) or text
        return {"sent_id": self.sentences, "sent": cleaned, "raw": text, "tokens": cleaned.split()}

    def _picture_of(self, who: str, record: Mapping[str, Any], numbers: Sequence[Any]) -> int:
        image_id = record.get("image_id")
        if image_id is None and "file_name" in record:
            image_id = self.by_name.get(str(record["file_name"]))
            if image_id is None:
                raise ValueError(f"{who} names picture {record['file_name']!r}, which `instances` does not list.")
        if image_id is None and numbers:
            if numbers[0] not in self.annotations:
                raise ValueError(f"{who} refers to annotation {numbers[0]}, which `instances` does not list.")
            image_id = self.annotations[numbers[0]].get("image_id")
        if image_id is None:
            raise ValueError(f"{who} must name its picture by `image_id` or `file_name`, as it has no target.")
        if not isinstance(image_id, int) or image_id not in self.pictures:
            raise ValueError(f"{who} is of picture {image_id!r}, which `instances` does not list.")
        if image_id not in self.used:
            self.used[image_id] = self._checked_picture(image_id)
        return image_id

    def _checked_picture(self, image_id: int) -> dict[str, Any]:
        from PIL import Image, UnidentifiedImageError

        entry = self.pictures[image_id]
        given = PurePosixPath(str(entry.get("file_name", "")))
        if not given.name or given.is_absolute() or ".." in given.parts:
            raise ValueError(f"{_WHO}: picture {image_id} must have a file name below `images`, got {given}.")
        path, name = self.images / given, "_".join(given.parts)
        if not path.is_file():
            raise FileNotFoundError(f"{_WHO}: picture {image_id} is missing: {path} is no file.")
        if name in self.sources:
            raise ValueError(f"{_WHO}: pictures {self.sources[name]} and {path} must not have the same name.")
        try:
            with Image.open(path) as picture:
                width, height = picture.size
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{_WHO}: {path} is not a readable picture ({error}).") from None
        said = (entry.get("height", height), entry.get("width", width))
        if said != (height, width):
            raise ValueError(f"{_WHO}: {path} must be {said[0]} x {said[1]} as `instances` says, got {height} x {width}.")
        self.sources[name] = path
        return {**entry, "file_name": name, "height": height, "width": width}

    def _check_annotation(self, what: str, number: Any, image_id: int) -> None:
        if number not in self.annotations:
            raise ValueError(f"{what}, which `instances` does not list.")
        annotation, picture = self.annotations[number], self.used[image_id]
        if annotation.get("image_id") != image_id:
            raise ValueError(f"{what}, which is of picture {annotation.get('image_id')}, not {image_id}.")
        if annotation.get("iscrowd", 0):
            raise ValueError(f"{what}, which is a crowd; gRefCOCO's readers leave crowds out.")
        usable, _ = usable_segmentation(annotation.get("segmentation"))
        if usable is None:
            raise ValueError(f"{what}, which has no polygon of at least three points.")
        if isinstance(usable, Mapping):
            check_rle(what, usable, picture["height"], picture["width"])

    def write(self, folder: Path, categories: Any, link: bool) -> None:
        """Write the files and the pictures."""
        pictures = folder / "images" / "train2014"
        pictures.mkdir(parents=True)
        (folder / "grefcoco").mkdir()
        for name, path in self.sources.items():
            if link:
                (pictures / name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, pictures / name)
        annotations = [entry for one in self.annotations.values() if (entry := self._written(one)) is not None]
        content = {"images": list(self.used.values()), "annotations": annotations, "categories": categories}
        (folder / "grefcoco" / "instances.json").write_text(json.dumps(content))
        (folder / "grefcoco" / "grefs(unc).json").write_text(json.dumps(self.references))

    def _written(self, annotation: Mapping[str, Any]) -> dict[str, Any] | None:
        """The annotation with all of COCO's fields, if its picture is used and it can be rasterised."""
        picture = self.used.get(annotation.get("image_id", -1))
        segmentation = annotation.get("segmentation")
        segmentation = json.loads(segmentation) if isinstance(segmentation, bytes) else segmentation
        usable, _ = usable_segmentation(segmentation)
        if picture is None or usable is None:
            return None
        try:
            mask = segmentation_mask(usable, picture["height"], picture["width"])
        except ValueError:
            return None  # no expression means it: those were checked
        made = {"category_id": 1, "bbox": _box(mask), "area": int(mask.sum()), "iscrowd": 0}
        return {**made, **annotation, "segmentation": usable}


def _box(mask: np.ndarray) -> list[int]:
    """The mask's tight box: left, top, width and height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _told(record: Any) -> str:
    return f"{', '.join(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__
