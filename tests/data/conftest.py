"""Folders in the layout of each benchmark, tiny and made by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SQUARE = [1.0, 1, 5, 1, 5, 5, 1, 5]  # 4 x 4 pixels
WIDE = [8.0, 2, 14, 2, 14, 6, 8, 6]  # 6 x 4 pixels
HEIGHT, WIDTH = 12, 16


class Files:
    """Writes a benchmark's files below ``root``; pictures are 12 x 16 pixels."""

    square, wide = SQUARE, WIDE

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def ref(ref_id: int, ann_id: Any, *texts: str, split: str = "val", image_id: int = 7, **more: Any) -> dict[str, Any]:
        said = [{"sent_id": 10 * ref_id + n, "sent": t.lower(), "raw": t, "tokens": t.split()} for n, t in enumerate(texts)]
        base = {"ref_id": ref_id, "image_id": image_id, "split": split, "ann_id": ann_id, "category_id": 90, "sentences": said}
        # the file name of a reference is of no file
        return base | {"sent_ids": [one["sent_id"] for one in said], "file_name": f"COCO_train2014_{image_id:012d}_3.jpg"} | more

    @staticmethod
    def ann(ann_id: int, segmentation: Any = None, *, image_id: int = 7, **more: Any) -> dict[str, Any]:
        segmentation = [SQUARE] if segmentation is None else segmentation
        return {"id": ann_id, "image_id": image_id, "category_id": 90, "iscrowd": 0, "segmentation": segmentation} | more

    @staticmethod
    def name(image_id: int, half: str = "train") -> str:
        return f"COCO_{half}2014_{image_id:012d}.jpg"

    def picture(self, folder: str, name: str, colour: tuple[int, int, int] = (200, 30, 40)) -> Path:
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), colour).save(path)
        return path

    def write(
        self, folder: str, file_name: str, refs: Any, anns: list[Any], *, image_ids: tuple[int, ...] = (7,), **more: Any
    ) -> Path:
        """Write references and instances, and pictures into ``pictures`` (None: none)."""
        images = [{"id": n, "file_name": self.name(n), "height": HEIGHT, "width": WIDTH} for n in image_ids]
        images = more.get("images", images)
        base = self.root / folder
        base.mkdir(parents=True, exist_ok=True)
        categories = [{"id": 90, "name": "toothbrush"}]
        (base / "instances.json").write_text(json.dumps({"images": images, "annotations": anns, "categories": categories}))
        content = pickle.dumps(refs, protocol=more.get("protocol", 2)) if file_name.endswith(".p") else json.dumps(refs).encode()
        (base / file_name).write_bytes(content)
        for image in images if more.get("pictures", "images/train2014") is not None else ():
            self.picture(more.get("pictures", "images/train2014"), image["file_name"])
        return self.root


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)
