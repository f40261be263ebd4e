import json

import pytest

from gresbox.data import GRefCOCO, SyntheticGRES, synthesize

SIZES = {"train": 12, "val": 40, "testA": 8, "testB": 8}


@pytest.mark.parametrize(("level", "image_size"), [("basic", 64), ("full", 48)])
def test_grefcoco_reads_back_what_synthesize_writes(tmp_path, level, image_size):
    root = synthesize(tmp_path / "out", sizes=SIZES, level=level, image_size=image_size, seed=4)
    kinds = set()
    for split, size in SIZES.items():
        ours, theirs = SyntheticGRES(split, size, level=level, image_size=image_size, seed=4), GRefCOCO(root, split)
        assert len(theirs) == size
        for index in range(size):
            a, b = ours[index], theirs[index]
            assert (a.image == b.image).all()
            assert a.target.masks.shape == b.target.masks.shape
            assert (a.target.masks == b.target.masks).all()
            assert (a.target.boxes == b.target.boxes).all()
            names = ("text", "kind", "exists", "image_id", "ref_id", "sent_id")
            assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]
            kinds.add(b.kind)
    assert kinds == {"zero", "one", "many"}


def test_files_have_the_released_fields(tmp_path):
    root = synthesize(tmp_path / "deep" / "out", sizes={"val": 20})
    refs = json.loads((root / "grefcoco" / "grefs(unc).json").read_text())
    instances = json.loads((root / "grefcoco" / "instances.json").read_text())
    fields = ("ref_id", "image_id", "split", "ann_id", "category_id", "no_target", "sent_ids", "file_name", "sentences")
    assert all(tuple(ref) == fields for ref in refs)
    assert all(ref["no_target"] == (ref["ann_id"] == [-1]) == (ref["category_id"] == [-1]) for ref in refs)
    numbers = [annotation["id"] for annotation in instances["annotations"]]
    assert len(set(numbers)) == len(numbers)
    known = {annotation["id"]: annotation for annotation in instances["annotations"]}
    for ref in refs:
        assert all(known[number]["image_id"] == ref["image_id"] for number in ref["ann_id"] if number != -1)
    assert {path.name for path in (root / "images" / "train2014").iterdir()} == {
        image["file_name"] for image in instances["images"]
    }


def test_coco_api_agrees_on_area_and_box(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    root = synthesize(tmp_path / "out", sizes={"val": 5}, level="full")
    for annotation in json.loads((root / "grefcoco" / "instances.json").read_text())["annotations"]:
        assert coco.area(annotation["segmentation"]) == annotation["area"]
        assert coco.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="synthesize: `out_dir` must not exist or be empty"):
        synthesize(tmp_path, sizes={"val": 1})
    with pytest.raises(FileExistsError):
        synthesize(tmp_path / "mine.txt", sizes={"val": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr("gresbox.data.layout._annotation", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        synthesize(tmp_path / "out", sizes={"val": 3})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_wrong_split_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    assert len(GRefCOCO(synthesize(tmp_path / "out", sizes={"val": 2}), "val")) == 2
    with pytest.raises(ValueError, match="`split` must be one of"):
        synthesize(tmp_path / "other", sizes={"test": 2})
    assert not (tmp_path / "other").exists()
