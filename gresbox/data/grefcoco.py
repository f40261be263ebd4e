"""gRefCOCO as released: one sample per sentence, each with the instances that it refers to."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gresbox._checks import check_choice
from gresbox.data.masks import is_polygon, segmentation_mask
from gresbox.structures import GresSample, GresTarget

__all__ = ["GRefCOCO", "load_plain_pickle"]

_LAYOUT = """expected:
  ROOT/grefcoco/grefs(unc).json        (or grefs(unc).p)
  ROOT/grefcoco/instances.json
  ROOT/images/train2014/*.jpg          (or images/mscoco/images/train2014, or train2014)
found in ROOT: """

_PICTURES = ("images/train2014", "images/mscoco/images/train2014", "images/mscoco/train2014", "train2014")


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; a pickle that asks for anything else could run code."""

    _allowed = frozenset({"set", "frozenset", "int", "float", "complex", "bool", "bytearray", "list", "dict", "tuple"})

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in self._allowed:
            return super().find_class("builtins", name)
        if (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain containers and numbers are read")


def load_plain_pickle(file: BinaryIO) -> Any:
    """Unpickle plain containers, strings and numbers; nothing in the file is executed.

    Args:
        file: A binary file.

    Raises:
        pickle.UnpicklingError: If the file asks for anything else.

    Example:
        >>> import io, pickle
        >>> load_plain_pickle(io.BytesIO(pickle.dumps({"ref_id": 1, "ann_id": [-1]})))
        {'ref_id': 1, 'ann_id': [-1]}
    """
    return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()


class _Reference(NamedTuple):
    ref_id: int
    image_id: int
    annotations: tuple[Any, ...]  # one segmentation per referred instance
    sentences: tuple[tuple[int, str], ...]  # sent_id, text


class GRefCOCO(Dataset[GresSample]):
    """The gRefCOCO benchmark from its released files.

    Reads ``grefcoco/grefs(unc).json`` (or the pickle ``grefs(unc).p``, restricted to plain containers) and
    ``grefcoco/instances.json``. A picture is found by its ``image_id``; the ``file_name`` of a reference often has a suffix that no
    file has. ``ann_id`` may be a list, a number, or -1 for no target. References without sentences are skipped, so are crowd
    annotations. Polygons that are none (fewer than three points) are left out; a reference that has targets but none with a usable
    mask is left out too; one warning counts both.

    Paper: Liu et al., "GRES: Generalized Referring Expression Segmentation", arXiv:2306.00968.
    Differs from the released loader: run-length encodings are read, too; boxes are those of the masks, not the ``bbox`` fields.

    Args:
        root: Folder that holds ``grefcoco`` and the pictures, or the folder ``grefcoco`` itself.
        split: ``"train"``, ``"val"``, ``"testA"`` or ``"testB"``, or whatever the file holds.
        transform: Applied to every sample.
        sentence: Which form of a sentence is the text: ``"raw"`` or the cleaned ``"sent"``.
        images: Read pictures. False: only :meth:`target` and the texts are needed, as for scoring ready predictions.

    Shape:
        - ``[i].image``: ``(3, H, W)`` uint8 at the picture's own size; ``[i].target.masks``: ``(M, H, W)`` bool.

    Raises:
        FileNotFoundError: If the files are not there; the message shows the expected layout. If pictures are missing, it names one.
        ValueError: If there is no such split (the message lists those that are), or a file is not of the released form.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        transform: Callable[[GresSample], Any] | None = None,
        sentence: str = "raw",
        images: bool = True,
    ) -> None:
        check_choice("GRefCOCO", "sentence", sentence, ("raw", "sent"))
        folder = _find_annotations(Path(root))
        self.root, self.split, self.transform = Path(root), split, transform
        references = _select(_load_references(folder), split)
        self._sizes: dict[int, tuple[str, int, int]] = {}
        self._references = self._index(references, _load_instances(folder / "instances.json"), sentence)
        self._items = [(ref, place) for ref, entry in enumerate(self._references) for place in range(len(entry.sentences))]
        self._pictures = _find_pictures(Path(root), folder, {name for name, _, _ in self._sizes.values()}) if images else None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GresSample:
        reference, (sent_id, text) = self._entry(index)
        count = len(reference.annotations)
        sample = GresSample(
            image=self._read_picture(reference.image_id),
            text=text,
            target=self._target(reference),
            image_id=reference.image_id,
            ref_id=reference.ref_id,
            sent_id=sent_id,
            kind=("zero", "one", "many")[min(count, 2)],
            exists=count > 0,
        )
        return sample if self.transform is None else self.transform(sample)

    def target(self, index: int) -> GresTarget:
        """The truth of sample ``index`` alone, without reading its picture.

        Args:
            index: As for ``[index]``.
        """
        return self._target(self._entry(index)[0])

    def text(self, index: int) -> str:
        """The expression of sample ``index`` alone.

        Args:
            index: As for ``[index]``.
        """
        return self._entry(index)[1][1]

    def _entry(self, index: int) -> tuple[_Reference, tuple[int, str]]:
        if not -len(self._items) <= index < len(self._items):
            raise IndexError(f"GRefCOCO: `index` must be below {len(self._items)}, got {index}.")
        ref, place = self._items[index]
        return self._references[ref], self._references[ref].sentences[place]

    def _target(self, reference: _Reference) -> GresTarget:
        _, height, width = self._sizes[reference.image_id]
        masks = np.zeros((len(reference.annotations), height, width), dtype=bool)
        for mask, segmentation in zip(masks, reference.annotations, strict=True):
            try:
                mask |= segmentation_mask(segmentation, height, width)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"GRefCOCO: reference {reference.ref_id} has a segmentation that cannot be read: {error}"
                ) from None
        return GresTarget(torch.from_numpy(masks))

    def _read_picture(self, image_id: int) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        name, height, width = self._sizes[image_id]
        if self._pictures is None:
            raise RuntimeError("GRefCOCO: pictures were switched off by images=False; use target(index) and text(index).")
        path = self._pictures / name
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise type(error)(f"GRefCOCO: {path} is not a readable picture ({error}).") from None
        if pixels.shape[:2] != (height, width):
            raise ValueError(f"GRefCOCO: {path} must be {height} x {width} as in instances.json, got {pixels.shape[:2]}.")
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _index(self, references: list[Mapping[str, Any]], instances: Mapping[str, Any], sentence: str) -> list[_Reference]:
        try:
            return self._checked_index(references, instances, sentence)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"GRefCOCO: references and instances must have the released form's fields, got an entry without ({error})."
            ) from error

    def _checked_index(self, references: list[Mapping[str, Any]], instances: Mapping[str, Any], sentence: str) -> list[_Reference]:
        pictures = {image["id"]: image for image in instances["images"]}
        annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        bad: set[int] = set()
        entries, lost = [], 0
        for ref in references:
            image_id, ann_ids = ref["image_id"], _as_list(ref["ann_id"])
            texts = tuple((said["sent_id"], said.get(sentence) or said["sent"]) for said in ref["sentences"])
            if not texts:
                continue
            if image_id not in pictures:
                raise ValueError(
                    f"GRefCOCO: reference {ref['ref_id']} needs picture {image_id}, which instances.json does not list."
                )
            usable = []
            for ann_id in ann_ids:
                if ann_id not in annotations:
                    raise ValueError(
                        f"GRefCOCO: reference {ref['ref_id']} needs annotation {ann_id}, which instances.json does not list."
                    )
                usable += _usable(annotations[ann_id], bad)
            if ann_ids and not usable:
                lost += 1
                continue
            picture = pictures[image_id]
            self._sizes[image_id] = (picture["file_name"], picture["height"], picture["width"])
            entries.append(_Reference(ref["ref_id"], image_id, tuple(usable), texts))
        if bad or lost:
            warnings.warn(
                f"GRefCOCO: {len(bad)} annotations hold polygons of fewer than three points, which are left out; "
                f"{lost} references have no usable mask and are skipped.",
                stacklevel=4,
            )
        return entries


def _as_list(ann_id: Any) -> list[int]:
    """The annotations of a reference: a list, a number, or -1 for none."""
    return [one for one in (ann_id if isinstance(ann_id, list | tuple) else [ann_id]) if one != -1]


def _usable(annotation: Mapping[str, Any], bad: set[int]) -> list[Any]:
    """The annotation's segmentation without parts that are no polygons, as a list of one; empty for crowds and if none is left."""
    segmentation = annotation.get("segmentation")
    if annotation.get("iscrowd", 0):
        return []
    if isinstance(segmentation, Mapping):
        return [segmentation]
    parts = [part for part in segmentation or () if is_polygon(part)]
    if not segmentation or len(parts) < len(segmentation):
        bad.add(annotation["id"])
    return [parts] if parts else []


def _find_annotations(root: Path) -> Path:
    for folder in (root / "grefcoco", root):
        if any((folder / name).is_file() for name in ("grefs(unc).json", "grefs(unc).p")) and (folder / "instances.json").is_file():
            return folder
    if not root.is_dir():
        found = "no such folder" if not root.exists() else "not a folder"
    else:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
        found = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
        if (root / "grefcoco").is_dir():
            inside = sorted(entry.name for entry in os.scandir(root / "grefcoco"))
            found += f"; in ROOT/grefcoco: {', '.join(inside[:12]) or 'nothing'}"
    raise FileNotFoundError(f"GRefCOCO: `root` must hold the gRefCOCO dataset, got {root}.\n{_LAYOUT}{found}")


def _load_references(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "grefs(unc).json"
    if path.is_file():
        references = _load_json(path)
    else:
        path = folder / "grefs(unc).p"
        try:
            with path.open("rb") as file:
                references = load_plain_pickle(file)
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"GRefCOCO: {path} is not a pickle of plain references: {error}.") from None
    fields = {"ref_id", "image_id", "split", "ann_id", "sentences"}
    if not isinstance(references, list) or not all(isinstance(ref, dict) and fields <= ref.keys() for ref in references):
        raise ValueError(f"GRefCOCO: {path} must be a list of references with {', '.join(sorted(fields))}, got another content.")
    return references


def _load_instances(path: Path) -> Mapping[str, Any]:
    instances = _load_json(path)
    if not isinstance(instances, dict) or not {"images", "annotations"} <= instances.keys():
        raise ValueError(f"GRefCOCO: {path} must hold `images` and `annotations`, got another content.")
    return instances


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"GRefCOCO: {path} is not JSON ({error}).") from None


def _select(references: list[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    splits = {ref["split"]: None for ref in references}
    check_choice("GRefCOCO", "split", split, tuple(splits))
    return [ref for ref in references if ref["split"] == split]


def _find_pictures(root: Path, folder: Path, names: set[str]) -> Path:
    """The folder of the pictures; all that are needed must be there."""
    bases = dict.fromkeys((root, folder, folder.parent))
    best: tuple[int, Path] | None = None
    for candidate in (base / inner for base in bases for inner in _PICTURES):
        if candidate.is_dir():
            missing = len(names - {entry.name for entry in os.scandir(candidate)})
            if not missing:
                return candidate
            if best is None or missing < best[0]:
                best = (missing, candidate)
    if best is None:
        raise FileNotFoundError(
            f"GRefCOCO: `root` must hold the pictures in one of {', '.join(_PICTURES)}, got none of these folders in {root}."
        )
    missing, candidate = best
    first = min(names - {entry.name for entry in os.scandir(candidate)})
    raise FileNotFoundError(f"GRefCOCO: {missing} of {len(names)} pictures are missing in {candidate}, for example {first}.")
