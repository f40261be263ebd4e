"""Write the synthetic benchmark as files, in gRefCOCO's own layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gresbox.data.masks import encode_rle
from gresbox.data.scenes import LEVELS, render
from gresbox.data.synthetic import SyntheticGRES

__all__ = ["make_folder", "synthesize"]

_SIZES = {"train": 2000, "val": 500, "testA": 500, "testB": 500}


def synthesize(
    out_dir: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    level: str = "basic",
    image_size: int = 64,
    seed: int = 0,
    proportions: tuple[float, float, float] = (0.15, 0.5, 0.35),
) -> Path:
    """Write :class:`SyntheticGRES` in the layout of the released gRefCOCO, so that any program that reads that can read this.

    Writes ``grefcoco/grefs(unc).json``, ``grefcoco/instances.json`` (every object, as compressed run-length encodings of the
    visible part; the categories are the shapes) and lossless pictures in ``images/train2014``. ``GRefCOCO(out_dir, split)`` returns
    the same samples as ``SyntheticGRES(split, sizes[split], ...)``. The folder appears complete or not at all.

    Args:
        out_dir: Folder to make; it must not exist or be empty.
        sizes: Samples per split; default: 2000 for ``train``, 500 for each other.
        level: As for :class:`SyntheticGRES`, like the rest.
        image_size: Side of the pictures, in pixels.
        seed: The benchmark's seed.
        proportions: Shares of expressions with no, one and many targets.

    Returns:
        The folder.

    Raises:
        FileExistsError: If ``out_dir`` is a file or holds something.
        ValueError: If an argument is out of range.

    Example:
        >>> import tempfile
        >>> from gresbox.data import GRefCOCO
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = synthesize(f"{folder}/shapes", sizes={"val": 3})
        ...     len(GRefCOCO(root, "val"))
        3
    """
    options: dict[str, Any] = {"level": level, "image_size": image_size, "seed": seed, "proportions": proportions}
    wanted = _SIZES if sizes is None else sizes
    datasets = [SyntheticGRES(split, size, **options) for split, size in wanted.items()]
    return make_folder("synthesize", out_dir, lambda folder: _write(folder, datasets))


def make_folder(who: str, out_dir: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a folder that appears complete or not at all.

    Args:
        who: The caller's public name, for the message.
        out_dir: Folder to make; it must not exist or be empty.
        write: Is given a temporary folder beside it, which does not exist yet.

    Returns:
        The folder.

    Raises:
        FileExistsError: If ``out_dir`` is a file or holds something.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{who}: `out_dir` must not exist or be empty, got {out}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(folder: Path, datasets: list[SyntheticGRES]) -> None:
    from PIL import Image

    pictures = folder / "images" / "train2014"
    pictures.mkdir(parents=True)
    (folder / "grefcoco").mkdir()
    shapes = LEVELS["full"].shapes
    references: list[dict[str, Any]] = []
    instances: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": shape, "supercategory": "shape"} for number, shape in enumerate(shapes, 1)],
    }
    for data in datasets:
        for index in range(len(data)):
            picture, image, annotations, reference = _records(data, index)
            Image.fromarray(picture).save(pictures / image["file_name"])
            instances["images"].append(image)
            instances["annotations"] += annotations
            references.append(reference)
    (folder / "grefcoco" / "instances.json").write_text(json.dumps(instances))
    (folder / "grefcoco" / "grefs(unc).json").write_text(json.dumps(references))


def _records(data: SyntheticGRES, index: int) -> tuple[np.ndarray, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """A sample's picture, and its entries in the two files."""
    scene, expression = data.scene(index)
    picture, masks = render(scene)
    number = data.number(index)
    name = f"synthetic_{data.split}_{number:012d}.png"
    image = {"id": number, "file_name": name, "height": data.image_size, "width": data.image_size}
    shapes = LEVELS["full"].shapes
    annotations = [
        _annotation(number * 16 + place, number, shapes.index(thing.shape) + 1, mask)
        for place, (thing, mask) in enumerate(zip(scene.objects, masks, strict=True))
    ]
    meant = [annotations[place] for place in expression.targets]
    sentence = {"sent_id": number, "sent": expression.text, "raw": expression.text, "tokens": expression.text.split()}
    reference = {
        "ref_id": number,
        "image_id": number,
        "split": data.split,
        "ann_id": [annotation["id"] for annotation in meant] or [-1],
        "category_id": sorted({annotation["category_id"] for annotation in meant}) or [-1],
        "no_target": not meant,
        "sent_ids": [number],
        "file_name": name,
        "sentences": [sentence],
    }
    return picture, image, annotations, reference


def _annotation(ann_id: int, image_id: int, category_id: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": encode_rle(mask),
    }
