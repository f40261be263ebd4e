import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gresbox.data import GRefCOCO, convert_coco, verify
from gresbox.data.masks import encode_rle

SQUARE = [1.0, 1, 5, 1, 5, 5, 1, 5]


@pytest.fixture
def own(tmp_path):
    """One's own data: two pictures, one in a folder, and COCO-style instances."""
    (tmp_path / "pictures" / "inner").mkdir(parents=True)
    Image.new("RGB", (16, 12), (200, 30, 40)).save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (16, 12), (10, 30, 240)).save(tmp_path / "pictures" / "inner" / "b.png")
    rle = np.zeros((12, 16), dtype=bool)
    rle[9:, 3:7] = True
    annotations = [
        {"id": 3, "image_id": 1, "category_id": 5, "segmentation": [SQUARE]},
        {"id": 4, "image_id": 1, "category_id": 6, "segmentation": encode_rle(rle), "bbox": [3, 9, 4, 3], "area": 12.0},
        {"id": 5, "image_id": 1, "category_id": 6, "segmentation": [[1, 2]]},
        {"id": 6, "image_id": 1, "category_id": 6, "segmentation": [SQUARE], "iscrowd": 1},
        {"id": 7, "image_id": 2, "category_id": 6, "segmentation": {"size": [2, 2], "counts": [4]}},
        {"id": 8, "image_id": 2, "category_id": 6, "segmentation": [[x + 6 for x in SQUARE]]},
        {"id": 9, "image_id": 3, "category_id": 6, "segmentation": [SQUARE]},
    ]
    images = [
        {"id": 1, "file_name": "a.png", "height": 12, "width": 16},
        {"id": 2, "file_name": "inner/b.png"},
        {"id": 3, "file_name": "gone.png", "height": 12, "width": 16},
    ]
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


RECORDS = [
    {"text": ["The Cat, left!", "kitty"], "ann_ids": [3]},
    {"text": "both animals", "ann_ids": [3, 4], "split": "val", "image_id": 1},
    {"text": "the horse", "ann_ids": [], "file_name": "inner/b.png", "split": "val"},
    {"text": "the dog", "ann_ids": [8], "file_name": "inner/b.png", "split": "val"},
]


@pytest.mark.parametrize("form", ["lines", "list", "records"])
@pytest.mark.parametrize("link", [False, True])
def test_ones_own_data_is_read_back(own, form, link):
    given = {"lines": own / "said.jsonl", "list": own / "said.json", "records": RECORDS}[form]
    if form == "lines":
        given.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    elif form == "list":
        given.write_text(json.dumps(RECORDS, indent=2))
    root = convert_coco(own / "instances.json", given, own / "pictures", own / "out" / "mine", link=link)
    train, val = GRefCOCO(root, "train"), GRefCOCO(root, "val")
    assert [(s.text, s.kind, int(s.target.merged.sum())) for s in train] == [("The Cat, left!", "one", 16), ("kitty", "one", 16)]
    assert [(s.text, s.kind, int(s.target.merged.sum())) for s in val] == [
        ("both animals", "many", 28),
        ("the horse", "zero", 0),
        ("the dog", "one", 16),
    ]
    assert GRefCOCO(root, "train", sentence="sent")[0].text == "the cat left"
    assert [int(s.image.float().mean((1, 2)).argmax()) for s in val] == [0, 2, 2]
    assert [path.is_symlink() for path in sorted((root / "images" / "train2014").iterdir())] == [link, link]
    report = verify(root)
    assert report.ok
    assert not report.benchmarks[0].notes
    assert sorted(os.listdir(own / "out")) == ["mine"]


def test_the_files_have_the_released_fields(own):
    root = convert_coco(own / "instances.json", RECORDS, own / "pictures", own / "out")
    refs = json.loads((root / "grefcoco" / "grefs(unc).json").read_text())
    fields = ("ref_id", "image_id", "split", "ann_id", "category_id", "no_target", "sent_ids", "file_name", "sentences")
    assert all(tuple(ref) == fields for ref in refs)
    assert [(ref["ann_id"], ref["category_id"], ref["no_target"]) for ref in refs] == [
        ([3], [5], False),
        ([3, 4], [5, 6], False),
        ([-1], [-1], True),
        ([8], [6], False),
    ]
    assert [ref["sent_ids"] for ref in refs] == [[1, 2], [3], [4], [5]]
    assert refs[0]["sentences"][0]["tokens"] == ["the", "cat", "left"]
    instances = json.loads((root / "grefcoco" / "instances.json").read_text())
    assert [image["file_name"] for image in instances["images"]] == ["a.png", "inner_b.png"]
    assert [(image["height"], image["width"]) for image in instances["images"]] == [(12, 16)] * 2
    known = {annotation["id"]: annotation for annotation in instances["annotations"]}
    assert set(known) == {3, 4, 6, 8}  # all of the pictures that are used and can be rasterised
    assert (known[3]["bbox"], known[3]["area"], known[3]["iscrowd"]) == ([1, 1, 4, 4], 16, 0)
    assert known[4]["area"] == 12.0
    assert instances["categories"][0] == {"id": 5, "name": "cat"}


WRONG = {
    "no record": ([], "`expressions` must hold at least one record, got none"),
    "not a record": (["the cat"], "expression 1 must be a record of text, ann_ids, .*, got str"),
    "a misspelt key": ([RECORDS[0], {"text": "a", "annIds": [3]}], "expression 2 must be a record of .*, got text, annIds"),
    "no text": ([{"ann_ids": [3]}], "expression 1 must have a `text` that says something"),
    "an empty text": ([{"text": ["a", " "], "ann_ids": [3]}], "must have a `text` that says something"),
    "no annotations": (
        [{"text": "a", "image_id": 1}],
        "must have `ann_ids`, a list of numbers that is empty for no target, got None",
    ),
    "annotations that are text": ([{"text": "a", "ann_ids": ["3"]}], "must have `ann_ids`, a list of numbers"),
    "a split that is none": ([{"text": "a", "ann_ids": [3], "split": 1}], "must have a `split` that is a word, got 1"),
    "an unknown annotation": ([{"text": "a", "ann_ids": [33]}], "refers to annotation 33, which `instances` does not list"),
    "a later unknown annotation": ([{"text": "a", "ann_ids": [3, 33]}], "refers to annotation 33, which"),
    "an unknown picture": ([{"text": "a", "ann_ids": [], "image_id": 5}], "is of picture 5, which `instances` does not list"),
    "a picture id that is text": ([{"text": "a", "ann_ids": [], "image_id": "1"}], "is of picture '1', which"),
    "an unknown file": (
        [{"text": "a", "ann_ids": [], "file_name": "c.png"}],
        "names picture 'c.png', which `instances` does not list",
    ),
    "no picture": ([{"text": "a", "ann_ids": []}], "must name its picture by `image_id` or `file_name`, as it has no target"),
    "two pictures": ([{"text": "a", "ann_ids": [3, 8]}], "refers to annotation 8, which is of picture 2, not 1"),
    "a crowd": ([{"text": "a", "ann_ids": [6]}], "refers to annotation 6, which is a crowd"),
    "a degenerate polygon": (
        [{"text": "a", "ann_ids": [5]}],
        "refers to annotation 5, which has no polygon of at least three points",
    ),
    "an encoding of another size": (
        [{"text": "a", "ann_ids": [7]}],
        r"annotation 7: `segmentation` must be of size \(12, 16\), got",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_record_is_one_clear_line_and_nothing_is_written(own, what):
    records, message = WRONG[what]
    with pytest.raises(ValueError, match=f"convert_coco: .*{message}") as caught:
        convert_coco(own / "instances.json", records, own / "pictures", own / "out")
    assert "\n" not in str(caught.value)
    assert not (own / "out").exists()


def test_wrong_pictures_and_files(own):
    def convert(records=RECORDS, instances="instances.json", images="pictures", out="out"):
        return convert_coco(own / instances, records, own / images, own / out)

    with pytest.raises(FileNotFoundError, match=r"convert_coco: picture 3 is missing: .*gone\.png is no file"):
        convert([{"text": "a", "ann_ids": [9]}])
    with pytest.raises(FileNotFoundError, match="convert_coco: `instances` must be a file"):
        convert(instances="nothing.json")
    with pytest.raises(FileNotFoundError, match="convert_coco: `expressions` must be a file"):
        convert(own / "nothing.jsonl")
    (own / "said.jsonl").write_text('{"text": "a", "ann_ids": [3]}\n{"text"\n')
    with pytest.raises(ValueError, match=r"convert_coco: line 2 of .*said\.jsonl is not JSON"):
        convert(own / "said.jsonl")
    (own / "said.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"convert_coco: .*said\.json is not JSON"):
        convert(own / "said.json")
    Image.new("RGB", (5, 5)).save(own / "pictures" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png must be 12 x 16 as `instances` says, got 5 x 5"):
        convert()
    (own / "pictures" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png is not a readable picture"):
        convert()
    assert not (own / "out").exists()
    (own / "pictures" / "taken").mkdir()
    with pytest.raises(FileExistsError, match="convert_coco: `out_dir` must not exist or be empty"):
        convert(RECORDS[3:], out="pictures")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "", "."])
def test_a_picture_outside_the_folder_is_not_read(own, name):
    content = json.loads((own / "instances.json").read_text())
    content["images"][0]["file_name"] = name
    (own / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="convert_coco: picture 1 must have a file name below `images`"):
        convert_coco(own / "instances.json", RECORDS, own / "pictures", own / "out")


def test_two_pictures_of_the_same_name(own):
    content = json.loads((own / "instances.json").read_text())
    content["images"][0]["file_name"] = "inner_b.png"
    (own / "pictures" / "a.png").rename(own / "pictures" / "inner_b.png")
    (own / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"convert_coco: pictures .*inner_b\.png and .*inner/b\.png must not have the same name"):
        convert_coco(own / "instances.json", RECORDS, own / "pictures", own / "out")


def test_the_example_of_the_documentation_runs_as_it_stands(capsys):
    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    blocks = [block.split("```")[0] for block in page.read_text(encoding="utf-8").split("```python\n")[1:]]
    (example,) = [block for block in blocks if "convert_coco(" in block]
    exec(compile(example, str(page), "exec"), {})
    shown = capsys.readouterr().out
    assert "every sample can be read" in shown
    assert "[('both cups', 'many'), ('the two cups', 'many'), ('the cup on the left', 'one')]" in shown
