import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from gresbox.data import GRefCOCO
from gresbox.data.masks import encode_rle

SQUARE = [1.0, 1, 5, 1, 5, 5, 1, 5]
WIDE = [8.0, 2, 14, 2, 14, 6, 8, 6]


def ref(ref_id, ann_id, *texts, split="val", image_id=7, **more):
    sentences = [{"sent_id": 10 * ref_id + n, "sent": t.lower(), "raw": t, "tokens": t.split()} for n, t in enumerate(texts)]
    base = {"ref_id": ref_id, "image_id": image_id, "split": split, "ann_id": ann_id, "category_id": [1], "sentences": sentences}
    return base | {"file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg"} | more


def ann(ann_id, segmentation, **more):
    return {"id": ann_id, "image_id": 7, "category_id": 1, "iscrowd": 0, "segmentation": segmentation} | more


def write(root, refs, anns, *, pictures="images/train2014", form="json"):
    (root / "grefcoco").mkdir(parents=True)
    (root / pictures).mkdir(parents=True)
    images = [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": 12, "width": 16}]
    (root / "grefcoco" / "instances.json").write_text(json.dumps({"images": images, "annotations": anns, "categories": []}))
    if form == "json":
        (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    else:
        (root / "grefcoco" / "grefs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    Image.new("RGB", (16, 12), (200, 30, 40)).save(root / pictures / images[0]["file_name"])
    return root


def test_records_of_every_form(tmp_path):
    rle = np.zeros((12, 16), dtype=bool)
    rle[9:, 3:7] = True
    anns = [ann(1, [SQUARE]), ann(2, [WIDE, [0, 9, 2, 9, 2, 11, 0, 11]]), ann(3, encode_rle(rle))]
    anns += [ann(4, encode_rle(rle, compressed=False)), ann(5, [SQUARE], iscrowd=1)]
    refs = [
        ref(1, [1, 2], "Both Things", "the two"),
        ref(2, [-1], "the dog", category_id=[-1], no_target=True),
        ref(3, 3, "the strip"),
        ref(4, [4, 5], "the strip, not the crowd"),
        ref(5, [1]),
        ref(6, -1, "nothing"),
        ref(7, [1], "elsewhere", split="train"),
    ]
    data = GRefCOCO(write(tmp_path, refs, anns), "val")
    samples = list(data)
    assert [sample.text for sample in samples] == [
        "Both Things",
        "the two",
        "the dog",
        "the strip",
        "the strip, not the crowd",
        "nothing",
    ]
    assert [sample.kind for sample in samples] == ["many", "many", "zero", "one", "one", "zero"]
    assert [sample.exists for sample in samples] == [True, True, False, True, True, False]
    assert [(sample.ref_id, sample.sent_id) for sample in samples[:3]] == [(1, 10), (1, 11), (2, 20)]
    assert all(sample.image.shape == (3, 12, 16) and sample.image_id == 7 for sample in samples)
    first = torch.zeros(12, 16, dtype=torch.bool)
    first[1:5, 1:5] = True
    assert (samples[0].target.masks[0] == first).all()
    assert samples[0].target.masks[1].sum() == 6 * 4 + 2 * 2  # both parts
    assert (samples[3].target.masks[0].numpy() == rle).all()
    assert (samples[4].target.merged.numpy() == rle).all()  # the crowd is not in it
    assert GRefCOCO(tmp_path, "val", sentence="sent")[0].text == "both things"
    assert GRefCOCO(tmp_path, "train", transform=lambda sample: sample.text)[0] == "elsewhere"


def test_polygons_that_are_none_are_counted_once(tmp_path):
    anns = [ann(1, [SQUARE, [1, 2, 3, 4]]), ann(2, []), ann(3, [[1, 2]]), ann(4, [WIDE])]
    refs = [ref(1, [1], "a"), ref(2, [2, 3], "b"), ref(3, [4, 3], "c")]
    with pytest.warns(UserWarning, match="3 annotations hold polygons of fewer than three points.* 1 references") as caught:
        data = GRefCOCO(write(tmp_path, refs, anns), "val")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [(sample.text, sample.kind) for sample in data] == [("a", "one"), ("c", "one")]
    assert data[0].target.masks[0].sum() == 16


@pytest.mark.parametrize("pictures", ["images/train2014", "images/mscoco/images/train2014", "train2014"])
@pytest.mark.parametrize("inner", ["", "grefcoco"])
def test_where_files_may_be(tmp_path, pictures, inner):
    root = write(tmp_path, [ref(1, [1], "a")], [ann(1, [SQUARE])], pictures=pictures)
    sample = GRefCOCO(root / inner, "val")[0]
    assert abs(sample.image.float().mean((1, 2)) - torch.tensor([200.0, 30, 40])).max() < 4


def test_a_pickle_of_plain_containers_is_read(tmp_path):
    root = write(tmp_path, [ref(1, [1], "a"), ref(2, [-1], "b")], [ann(1, [SQUARE])], form="pickle")
    assert [sample.kind for sample in GRefCOCO(root, "val")] == ["one", "zero"]


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("payload", [Evil(), [{"x": Evil()}], np.zeros(2), print])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, payload, capsys):
    root = write(tmp_path, [], [], form="pickle")
    (root / "grefcoco" / "grefs(unc).p").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"GRefCOCO: .*grefs\(unc\)\.p is not a pickle of plain references: it asks for"):
        GRefCOCO(root, "val")
    assert "code ran" not in capsys.readouterr().out


def test_root_without_the_dataset(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "grefcoco").mkdir()
    (tmp_path / "grefcoco" / "refs.json").write_text("[]")
    with pytest.raises(FileNotFoundError) as caught:
        GRefCOCO(tmp_path, "val")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"GRefCOCO: `root` must hold the gRefCOCO dataset, got {tmp_path}."
    assert any("grefs(unc).json" in line for line in lines)
    assert any("images/train2014" in line for line in lines)
    assert lines[-1] == "found in ROOT: grefcoco/, photos/; in ROOT/grefcoco: refs.json"
    with pytest.raises(FileNotFoundError, match="found in ROOT: no such folder"):
        GRefCOCO(tmp_path / "nowhere", "val")
    with pytest.raises(FileNotFoundError, match="found in ROOT: nothing"):
        GRefCOCO(tmp_path / "photos", "val")


def test_pictures_that_are_missing_are_named(tmp_path):
    root = write(tmp_path, [ref(1, [1], "a")], [ann(1, [SQUARE])])
    picture = next((root / "images" / "train2014").iterdir())
    picture.rename(picture.with_name("other.jpg"))
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 pictures are missing in .*train2014, for example COCO_train2014_000000000007\.jpg"
    ):
        GRefCOCO(root, "val")
    shutil.rmtree(root / "images")
    with pytest.raises(FileNotFoundError, match="must hold the pictures in one of images/train2014, "):
        GRefCOCO(root, "val")
    data = GRefCOCO(root, "val", images=False)
    assert (data.text(0), int(data.target(0).merged.sum())) == ("a", 16)
    with pytest.raises(RuntimeError, match="images=False"):
        data[0]


def test_a_picture_that_is_not_one_or_of_another_size(tmp_path):
    root = write(tmp_path, [ref(1, [1], "a")], [ann(1, [SQUARE])])
    picture = next((root / "images" / "train2014").iterdir())
    data = GRefCOCO(root, "val")
    Image.new("RGB", (5, 5)).save(picture)
    with pytest.raises(ValueError, match=r"must be 12 x 16 as in instances\.json, got \(5, 5\)"):
        data[0]
    picture.write_text("no picture")
    with pytest.raises(OSError, match="is not a readable picture"):
        data[0]


@pytest.mark.parametrize(
    ("refs", "anns", "message"),
    [
        ([ref(1, [9], "a")], [], "reference 1 needs annotation 9, which instances.json does not list"),
        ([ref(1, [-1], "a", image_id=8)], [], "reference 1 needs picture 8, which instances.json does not list"),
        ([{"ref_id": 1}], [], "must be a list of references with ann_id, image_id, ref_id, sentences, split"),
        ({"refs": []}, [], "must be a list of references"),
        ([ref(1, [-1], "a", split="test")], [], "`split` must be one of 'test', got 'val'"),
    ],
)
def test_files_of_another_form(tmp_path, refs, anns, message):
    with pytest.raises(ValueError, match=message):
        GRefCOCO(write(tmp_path, refs, anns), "val")


def test_broken_files(tmp_path):
    root = write(tmp_path, [ref(1, [1], "a")], [ann(1, {"size": [2, 2], "counts": [4]})])
    with pytest.raises(ValueError, match="reference 1 has a segmentation that cannot be read: segmentation_mask"):
        GRefCOCO(root, "val")[0]
    (root / "grefcoco" / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match=r"instances\.json must hold `images` and `annotations`"):
        GRefCOCO(root, "val")
    (root / "grefcoco" / "grefs(unc).json").write_text("[{")
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json is not JSON"):
        GRefCOCO(root, "val")


def test_indices(tmp_path):
    data = GRefCOCO(write(tmp_path, [ref(1, [1], "a", "b")], [ann(1, [SQUARE])]), "val")
    assert data[-1].text == "b"
    with pytest.raises(IndexError, match="must be below 2, got 2"):
        data[2]


def test_real_pictures(realdata):
    root = realdata / "grefcoco_mini"
    refs = json.loads((root / "grefcoco" / "grefs(unc).json").read_text())
    known = {a["id"]: a for a in json.loads((root / "grefcoco" / "instances.json").read_text())["annotations"]}
    kinds = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        splits = {split: GRefCOCO(root, split) for split in dict.fromkeys(ref["split"] for ref in refs)}
    assert sum(map(len, splits.values())) == sum(len(ref["sentences"]) for ref in refs)
    by_id = {ref["ref_id"]: ref for ref in refs}
    for data in splits.values():
        for index in range(0, len(data), 4):
            sample = data[index]
            numbers = [number for number in by_id[sample.ref_id]["ann_id"] if number != -1]
            assert len(sample.target.masks) == len(numbers)
            assert sample.image.shape[1:] == sample.target.merged.shape
            for mask, number in zip(sample.target.masks, numbers, strict=True):
                x, y, w, h = known[number]["bbox"]
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                got = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert max(abs(float(a) - b) for a, b in zip(got, [x, y, x + w, y + h], strict=True)) <= 2
            kinds.add(sample.kind)
    assert kinds == {"zero", "one", "many"}
    with pytest.raises(ValueError, match="`split` must be one of 'train', "):
        GRefCOCO(root, "nowhere")


@pytest.mark.parametrize("lost", ["sent_id", "file_name"])
def test_a_missing_field_is_one_line(lost, tmp_path):
    references = [ref(1, [1], "the thing")]
    root = write(tmp_path, references, [ann(1, [SQUARE])])
    if lost == "sent_id":
        del references[0]["sentences"][0]["sent_id"]
        (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(references))
    else:
        path = root / "grefcoco" / "instances.json"
        path.write_text(path.read_text().replace("file_name", "filename"))
    with pytest.raises(ValueError, match=rf"released form's fields, got an entry without \('{lost}'\)"):
        GRefCOCO(root, "val")
