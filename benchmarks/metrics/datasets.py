"""Loading a benchmark's files: gresbox's datasets, or the refer APIs' index that copies a list per record.

Files of the released form with made-up content (24,000 references and 16,000 annotations, all in one split) are written once; timed
is all from the files to an index that can be asked. gresbox's time includes looking for every picture.
"""

from __future__ import annotations

import json
import pickle
import random
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Form
from benchmarks.peers.refer_index import GRefIndex, ReferIndex
from gresbox.data import GRefCOCO, RefCOCO

SIZES = {"references": 24_000, "annotations": 16_000, "images": 5_000}
CASES = {"gRefCOCO, JSON": {"layout": "grefcoco", **SIZES}, "RefCOCO, pickle": {"layout": "refcoco", **SIZES}}
ON = {"cpu": tuple(CASES), "cuda": ()}
DIFFERENTIABLE = ()
FILES = {"grefcoco": "grefs(unc).json", "refcoco": "refs(unc).p"}
WORDS = (
    "the",
    "left",
    "right",
    "man",
    "woman",
    "red",
    "blue",
    "dog",
    "on",
    "with",
    "two",
    "all",
    "of",
    "front",
    "shirt",
    "sitting",
)
PERSON_SHARE = 0.4  # of all annotations, so that one category's list is long, as COCO's is
Record = dict[str, Any]


def make_instances(draw: random.Random, images: int, annotations: int) -> Record:
    """Pictures of 640 x 480 and annotations with one or two polygons of about 25 points."""
    pictures = [
        {
            "id": 7 * number + 1,
            "file_name": f"COCO_train2014_{7 * number + 1:012d}.jpg",
            "height": 480,
            "width": 640,
            "license": 1,
            "coco_url": f"http://images.cocodataset.org/train2014/COCO_train2014_{7 * number + 1:012d}.jpg",
            "date_captured": "2013-11-14 11:18:45",
        }
        for number in range(images)
    ]
    entries = []
    for number in range(1, annotations + 1):
        parts = []
        for _ in range(1 if draw.random() < 0.8 else 2):
            points = int(draw.lognormvariate(3.2, 0.6)) + 3
            parts.append([round(draw.uniform(0, 480), 2) for _ in range(2 * points)])
        entries.append(
            {
                "id": number,
                "image_id": draw.choice(pictures)["id"],
                "category_id": 1 if draw.random() < PERSON_SHARE else draw.randrange(2, 91),
                "bbox": [round(draw.uniform(0, 200), 2) for _ in range(4)],
                "area": round(draw.uniform(100, 9000), 2),
                "iscrowd": 0,
                "segmentation": parts,
            }
        )
    return {
        "images": pictures,
        "annotations": entries,
        "categories": [{"id": number, "name": str(number)} for number in range(1, 91)],
    }


def make_references(draw: random.Random, instances: Record, count: int, generalised: bool) -> list[Record]:
    """References with one to three sentences; generalised: to none, one or two annotations."""
    of_image: dict[int, list[Record]] = {}
    for annotation in instances["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    pictures, references, spoken = list(of_image), [], 0
    for number in range(count):
        image_id = draw.choice(pictures)
        most = draw.choices((0, 1, 2), (12, 53, 35))[0] if generalised else 1
        meant = draw.sample(of_image[image_id], min(most, len(of_image[image_id])))
        sentences = []
        for _ in range(draw.choice((1, 3))):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(2, 8)))
            sentences.append({"sent_id": spoken, "sent": text, "raw": text.capitalize(), "tokens": text.split()})
            spoken += 1
        ann_ids: list[int] = [annotation["id"] for annotation in meant] or [-1]
        categories: list[int] = sorted({annotation["category_id"] for annotation in meant}) or [-1]
        references.append(
            {
                "ref_id": number,
                "image_id": image_id,
                "split": "train",
                "ann_id": ann_ids if generalised else ann_ids[0],
                "category_id": categories if generalised else categories[0],
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
                "sentences": sentences,
            }
        )
    return references


def write(root: Path, case: Record) -> list[str]:
    """One layout; the pictures are empty files. All sentences in order."""
    draw = random.Random(0)
    layout = case["layout"]
    instances = make_instances(draw, case["images"], case["annotations"])
    references = make_references(draw, instances, case["references"], layout == "grefcoco")
    (root / layout).mkdir(parents=True)
    (root / layout / "instances.json").write_text(json.dumps(instances))
    content = pickle.dumps(references, protocol=2) if layout == "refcoco" else json.dumps(references).encode()
    (root / layout / FILES[layout]).write_bytes(content)
    (root / "images" / "train2014").mkdir(parents=True)
    for picture in instances["images"]:
        (root / "images" / "train2014" / picture["file_name"]).touch()
    return [said["raw"] for reference in references for said in reference["sentences"]]


def make_inputs(case: Record, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Record:
    folder = tempfile.TemporaryDirectory()  # is removed when nobody holds the inputs any more
    return {"folder": folder, "layout": case["layout"], "said": write(Path(folder.name), case)}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def ours(folder: Any, layout: str, said: list[str]) -> GRefCOCO | RefCOCO:
        root = Path(folder.name)
        return GRefCOCO(root, "train") if layout == "grefcoco" else RefCOCO(root, "refcoco", "train")

    def refer(folder: Any, layout: str, said: list[str]) -> GRefIndex:
        return (GRefIndex if layout == "grefcoco" else ReferIndex)(Path(folder.name) / layout, FILES[layout])

    return {
        "gresbox": Form(ours, read=lambda data: as_numbers([data.text(index) for index in range(len(data))])),
        "refer's index": Form(refer, read=lambda index: as_numbers(index.texts("train"))),
    }


def as_numbers(texts: Sequence[str]) -> Tensor:
    """Texts as checksums: equal tensors are equal texts in the same order."""
    return torch.tensor([zlib.crc32(text.encode()) for text in texts])


def reference(folder: Any, layout: str, said: list[str]) -> Tensor:
    return as_numbers(said)
