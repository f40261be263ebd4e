"""The boxes that a benchmark's files give for its expressions: what detection is scored against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gresbox.data.references import paused_collection, read_instances, read_references

__all__ = ["read_annotated_boxes"]

_WHO = "read_annotated_boxes"


def read_annotated_boxes(dataset: Any) -> dict[int, Tensor]:
    """The ``bbox`` fields of what each reference of a split means.

    They are not the tight boxes of the masks: annotators drew outlines, and COCO's boxes are those of the outlines.

    Args:
        dataset: A data set of :mod:`gresbox.data`; one that reads no benchmark's files has no such boxes.

    Returns:
        By ``ref_id``; a reference is absent where an annotation has no box.

    Shape:
        - each ``(M, 4)`` float64: x0, y0, x1, y1 relative to the picture.

    Example:
        >>> import tempfile
        >>> from gresbox.data import GRefCOCO, synthesize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = GRefCOCO(synthesize(f"{folder}/shapes", sizes={"val": 3}), "val")
        ...     boxes = read_annotated_boxes(data)
        >>> sorted(boxes) == [data.info(index).ref_id for index in range(3)]
        True
    """
    files, benchmark = getattr(dataset, "files", None), getattr(dataset, "benchmark", None)
    if files is None or benchmark is None:
        return {}
    found = {}
    with paused_collection():
        instances = read_instances(_WHO, files.instances)
        for reference in benchmark.select(_WHO, read_references(_WHO, files.references), dataset.split):
            picture = instances.pictures.get(reference["image_id"])
            annotations = [instances.annotations.get(number) for number in benchmark.referred(reference)]
            meant = [one for one in annotations if one is not None and not (benchmark.skips_crowds and one.get("iscrowd", 0))]
            boxes = [_corners(one, picture) for one in meant if picture is not None]
            if len(boxes) == len(meant) and None not in boxes:
                found[reference["ref_id"]] = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return found


def _corners(annotation: Mapping[str, Any], picture: Mapping[str, Any]) -> list[float] | None:
    """Left, top, right and bottom as shares of the picture's width and height; None without a proper box."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(number) in (int, float) for number in box):
        return None
    left, top, width, height = box
    if not (width >= 0 and height >= 0):
        return None
    across, down = picture["width"], picture["height"]
    return [left / across, top / down, (left + width) / across, (top + height) / down]
