"""Loading a benchmark's files: gresbox's datasets, or the refer APIs' index that copies a list per record.

``python -m benchmarks.datasets`` writes files of the released form with made-up content (24,000 references and 16,000 annotations
by default, all in one split), opens them both ways, and compares the sentences. Timed is all from the files to an index that can
be asked; gresbox's time includes looking for every picture. Times are of the process alone, so that others on the machine do not
count. Both ways run in turn, in an order that alternates; the share is the median over rounds of the two times of the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.refer_index import GRefIndex, ReferIndex
from gresbox._files import write_atomically
from gresbox.data import GRefCOCO, RefCOCO

RESULT = Path(__file__).parent / "results" / "datasets--cpu.json"
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


def write(root: Path, options: argparse.Namespace) -> None:
    """Both layouts; the pictures are empty files."""
    draw = random.Random(0)
    instances = make_instances(draw, options.images, options.annotations)
    for folder, name in (("grefcoco", "grefs(unc).json"), ("refcoco", "refs(unc).p")):
        references = make_references(draw, instances, options.references, folder == "grefcoco")
        (root / folder).mkdir(parents=True)
        (root / folder / "instances.json").write_text(json.dumps(instances))
        content = pickle.dumps(references, protocol=2) if name.endswith(".p") else json.dumps(references).encode()
        (root / folder / name).write_bytes(content)
    (root / "images" / "train2014").mkdir(parents=True)
    for picture in instances["images"]:
        (root / "images" / "train2014" / picture["file_name"]).touch()


def seconds(call: Callable[[], object]) -> float:
    gc.collect()  # what the other way left behind is not this way's
    start = time.process_time()
    made = call()
    took = time.process_time() - start
    del made
    return took


def measure(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Record:
    mine, other = ours(), theirs()  # also the warm-up
    assert [mine.text(index) for index in range(len(mine))] == other.texts("train"), "the two ways read different sentences"
    row: Record = {"layout": name, "sentences": len(mine)}
    del mine, other
    ways = {"gresbox": ours, "refer": theirs}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(rounds):
        for way in list(ways) if index % 2 else list(ways)[::-1]:
            times[way].append(seconds(ways[way]))
    shares = [a / b for a, b in zip(times["gresbox"], times["refer"], strict=True)]
    return row | {
        "share_of_time": round(statistics.median(shares), 3),
        "share_min": round(min(shares), 3),
        "share_max": round(max(shares), 3),
        "gresbox_ms": round(1e3 * statistics.median(times["gresbox"]), 1),
        "refer_ms": round(1e3 * statistics.median(times["refer"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=24000, help="references (default: 24000)")
    parser.add_argument("--annotations", type=int, default=16000, help="annotations (default: 16000)")
    parser.add_argument("--images", type=int, default=5000, help="pictures (default: 5000)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: beside this program)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, options)
        rows = [
            measure(
                "gRefCOCO, JSON",
                lambda: GRefCOCO(root, "train"),
                lambda: GRefIndex(root / "grefcoco", "grefs(unc).json"),
                options.rounds,
            ),
            measure(
                "RefCOCO, pickle",
                lambda: RefCOCO(root, "refcoco", "train"),
                lambda: ReferIndex(root / "refcoco", "refs(unc).p"),
                options.rounds,
            ),
        ]
    for row in rows:
        print(
            f"{row['layout']}: {row['refer_ms']} ms -> {row['gresbox_ms']} ms, {row['share_of_time']} of the time "
            f"({row['share_min']} to {row['share_max']}), {row['sentences']} sentences"
        )
    setting = {name: getattr(options, name) for name in ("references", "annotations", "images", "rounds")}
    environment = {
        "device": "cpu",
        "threads": 1,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    result = {"what": "datasets", "setting": setting, "environment": environment, "rows": rows}
    write_atomically(options.out, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))


if __name__ == "__main__":
    main()
