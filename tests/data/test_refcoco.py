import json

import numpy as np
import pytest
import torch

from gresbox.data import RefCOCO
from gresbox.data.masks import encode_rle


def simple(files, folder="refcoco", name="refs(unc).p", **more):
    refs = [files.ref(1, 1, "Left One", "that one"), files.ref(2, 2, "wide", split="train")]
    return files.write(folder, name, refs, [files.ann(1), files.ann(2, [files.wide])], **more)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "file_name", "options"),
    [
        ("refcoco", "refs(unc).p", {}),
        ("refcoco", "refs(google).p", {"split_by": "google"}),
        ("refcoco+", "refs(unc).p", {}),
        ("refcocog", "refs(umd).p", {}),
        ("refcocog", "refs(google).p", {}),  # umd is not there
        ("refcocog", "refs(umd).json", {"split_by": "umd"}),
        ("refcocom", "refs(mix).p", {}),
    ],
)
def test_every_set_and_partition(files, name, file_name, options, protocol):
    root = simple(files, name, file_name, protocol=protocol)
    data = RefCOCO(root, name, "val", **options)
    assert [(one.text, one.kind, one.exists, one.ref_id, one.sent_id, one.image_id) for one in data] == [
        ("Left One", "one", True, 1, 10, 7),
        ("that one", "one", True, 1, 11, 7),
    ]
    assert tuple(data[0].target.masks.shape) == (1, 12, 16)
    assert int(data[0].target.merged.sum()) == 16
    assert abs(data[0].image.float().mean((1, 2)) - torch.tensor([200.0, 30, 40])).max() < 4
    assert RefCOCO(root, name=name, split="train", **options).text(0) == "wide"
    assert RefCOCO(root, name, "val", sentence="sent", **options)[0].text == "left one"


def test_the_usual_partition_is_preferred(files):
    simple(files, "refcocog", "refs(google).p")
    files.write("refcocog", "refs(umd).p", [files.ref(1, 1, "umd's")], [files.ann(1)])
    assert RefCOCO(files.root, "refcocog", "val").text(0) == "umd's"
    assert RefCOCO(files.root, "refcocog", "val", "google").text(0) == "Left One"


def test_joint_splits_are_taken_by_their_letter(files):
    splits = ("testA", "testAB", "testB", "testBC", "train")
    refs = [files.ref(number, 1, split, split=split) for number, split in enumerate(splits)]
    files.write("refcoco", "refs(unc).p", refs, [files.ann(1)])

    def texts(split):
        data = RefCOCO(files.root, "refcoco", split)
        return [data.text(index) for index in range(len(data))]

    assert texts("testA") == ["testA", "testAB"]
    assert texts("testB") == ["testAB", "testB", "testBC"]
    assert texts("testAB") == ["testAB"]
    assert texts("testC") == ["testBC"]
    assert texts("test") == ["testA", "testAB", "testB", "testBC"]
    with pytest.raises(ValueError, match=r"RefCOCO: `split` must be one of 'testA', 'testAB', .*, got 'val'"):
        RefCOCO(files.root, "refcoco", "val")


def test_overlapping_parts_are_a_union_without_holes(files):
    anns = [files.ann(1, [files.square, [3.0, 3, 9, 3, 9, 9, 3, 9]])]
    data = RefCOCO(files.write("refcoco", "refs(unc).p", [files.ref(1, 1, "a")], anns), "refcoco", "val")
    assert data[0].target.merged[1:5, 1:5].all()
    assert int(data[0].target.merged.sum()) == 16 + 36 - 4  # LAVT's `== 1` would leave out the four shared pixels twice


def test_crowds_are_truth_here_and_encodings_are_read(files):
    crowd = np.zeros((12, 16), dtype=bool)
    crowd[2:9, 3:8] = True
    anns = [files.ann(1, encode_rle(crowd, compressed=False), iscrowd=1), files.ann(2, encode_rle(crowd))]
    data = RefCOCO(files.write("refcoco", "refs(unc).p", [files.ref(1, 1, "a"), files.ref(2, [2], "b")], anns), "refcoco", "val")
    assert all((data.target(index).merged.numpy() == crowd).all() for index in range(2))


def test_bad_names(files):
    with pytest.raises(ValueError, match=r"RefCOCO: `name` must be one of 'refcoco', .*, got 'refcoc'"):
        RefCOCO(files.root, "refcoc", "val")
    with pytest.raises(ValueError, match="RefCOCO: `sentence` must be one of 'raw', 'sent', got 'words'"):
        RefCOCO(simple(files), "refcoco", "val", sentence="words")
    with pytest.raises(ValueError, match="RefCOCO: `size` must be at least 1, got 0"):
        RefCOCO(files.root, "refcoco", "val", size=0)


def test_real_records_have_the_masks_of_pycocotools(realdata, tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    records = json.loads((realdata / "refcoco_records" / "refcoco_real_sample.json").read_text())
    for image in records["images"]:
        image["height"] = image["height"] or 480  # the picture is not there; its polygons end above
    sizes = {image["id"]: (image["height"], image["width"]) for image in records["images"]}
    known = {annotation["id"]: annotation for annotation in records["annotations"]}
    seen = 0
    for name, partition in {(ref["dataset"], ref["dataset_partition"]) for ref in records["refs"]}:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        refs = [ref for ref in records["refs"] if (ref["dataset"], ref["dataset_partition"]) == (name, partition)]
        (folder / "instances.json").write_text(json.dumps({key: records[key] for key in ("images", "annotations")}))
        (folder / f"refs({partition}).json").write_text(json.dumps(refs))
        for split in dict.fromkeys(ref["split"] for ref in refs):
            data = RefCOCO(tmp_path, name, split, partition, images=False)
            for index in range(len(data)):
                ref = next(one for one in refs if one["ref_id"] == data.info(index).ref_id)
                parts = coco.frPyObjects(known[ref["ann_id"]]["segmentation"], *sizes[ref["image_id"]])
                assert coco.encode(np.asfortranarray(data.target(index).merged.numpy().astype(np.uint8))) == coco.merge(parts)
                assert data.text(index) in {sentence["raw"] for sentence in ref["sentences"]}
                seen += 1
    assert seen == sum(len(ref["sentences"]) for ref in records["refs"])
