import dataclasses
import json

import numpy as np
import pytest

from gresbox.data import GRefCOCO, RefCOCO, synthesize, verify
from gresbox.data.catalogue import BENCHMARKS, Counts, published_counts
from gresbox.data.masks import encode_rle


def test_a_sound_folder(tmp_path):
    root = synthesize(tmp_path / "shapes", sizes={"train": 6, "val": 3})
    report = verify(root)
    part = report.benchmarks[0]
    assert (report.ok, part.title, part.file) == (True, "gRefCOCO (unc)", "grefcoco/grefs(unc).json")
    assert part.counts == {"train": Counts(6, 6, 6), "val": Counts(3, 3, 3), "all": Counts(9, 9, 9)}
    assert (part.problems, part.notes, part.shared_pictures) == ({}, {}, {})
    assert part.as_published is False
    zero = sum(sample.kind == "zero" for split in ("train", "val") for sample in GRefCOCO(root, split))
    assert part.no_target["all"] == part.no_target["train"] + part.no_target["val"] == zero
    assert json.loads(json.dumps(dataclasses.asdict(report)))["benchmarks"][0]["counts"]["val"] == [3, 3, 3]


def test_the_report_for_a_person(files):
    refs = [files.ref(1, [1, 2], "a", "b"), files.ref(2, [-1], "c", split="train"), files.ref(3, [1], split="train")]
    root = files.write("grefcoco", "grefs(unc).json", refs, [files.ann(1, [[1, 2]]), files.ann(2)])
    lines = str(verify(root)).splitlines()
    assert lines == [
        "gRefCOCO (unc): grefcoco/grefs(unc).json",
        "  split  references  pictures  sentences  no target  published",
        "  val             1         1          2          0  differs: 1,500 pictures",
        "  train           2         1          1          1  differs: 16,994 pictures",
        "  all             3         1          3          1  differs: 19,994 pictures, 259,859 sentences",
        "  testA           0         0          0          0  differs: 750 pictures",
        "  testB           0         0          0          0  differs: 750 pictures",
        "  note: 1 annotations with degenerate polygons, which are left out: 1",
        "  note: 1 references without sentences, which are skipped: 3",
        "  note: 1 references that have targets but no usable mask, which are skipped: 3",
        "  note: val and train share 1 pictures",
        "  note: counts differ from the published ones; of data of one's own that is to be expected",
        "  every sample can be read",
    ]


def test_everything_that_can_be_wrong_is_listed(files):
    wrong = encode_rle(np.ones((3, 3), dtype=bool))
    refs = [
        files.ref(1, 1, "a", image_id=8),  # no such picture
        files.ref(2, 99, "b"),  # no such annotation
        files.ref(3, [3], "c"),  # of another picture
        files.ref(4, 4, "d", image_id=9),  # without a height
        files.ref(5, 5, "e"),  # an encoding of another size
        files.ref(6, 6, "f", source="two"),
        files.ref(6, 7, "g"),  # the same ids again
        files.ref(7, 1, "fine", source="one"),
        files.ref(8, 98, "fine, too", source="zero"),
    ]
    anns = [files.ann(1), files.ann(3, image_id=9), files.ann(4, image_id=9), files.ann(5, wrong), files.ann(6), files.ann(7, [])]
    images = [
        {"id": 7, "file_name": "a.jpg", "height": 12, "width": 16},
        {"id": 9, "file_name": "b.jpg", "height": None, "width": 16},
    ]
    files.write("ref-zom", "refs(final).p", refs, anns, images=images, pictures=None)
    files.picture("images/val2014", "a.jpg")
    report = verify(files.root)
    assert not report.ok
    assert report.benchmarks[0].problems == {
        "annotations with a run-length encoding that does not fit their picture": [5],
        "references to a picture that instances.json does not list": [1],
        "references to an annotation of another picture": [1, 3],
        "references to an annotation that instances.json does not list": [2],
        "pictures without a height or width": [9],
        "references whose source is not zero, one or many": [6],
        "pictures that are missing": ["b.jpg"],
    }
    assert report.benchmarks[0].notes == {
        "annotations with degenerate polygons, which are left out": [7],
        "references that have targets but no usable mask, which are skipped": [6],
        "reference ids that occur more than once": [6],
        "sentence ids that occur more than once": [60],
    }
    assert str(report).endswith("NOT every sample can be read")
    assert "pictures that are missing" not in verify(files.root, images=False).benchmarks[0].problems
    assert verify(files.root, images=files.root / "images/val2014").benchmarks[0].problems["pictures that are missing"] == ["b.jpg"]


def test_crowds_negative_sentences_and_several_benchmarks(files):
    files.write("grefcoco", "grefs(unc).json", [files.ref(1, [1], "a")], [files.ann(1, iscrowd=1)])
    first = files.ref(1, 1, "a", "b")
    first["sentences"][1]["exist"] = False
    files.write("rrefcoco", "refs(unc).p", [first], [files.ann(1, iscrowd=1)])
    files.write("refcoco", "refs(unc).p", [files.ref(1, 1, "a", split="testA")], [files.ann(1)])
    files.write("refcoco", "refs(google).p", [files.ref(1, 1, "a", split="test")], [files.ann(1)])
    report = verify(files.root)
    by_title = {part.title: part for part in report.benchmarks}
    assert list(by_title) == ["gRefCOCO (unc)", "RefCOCO (unc)", "RefCOCO (google)", "R-RefCOCO (unc)"]
    assert list(by_title["gRefCOCO (unc)"].notes) == [
        "references to crowd annotations, which the benchmark leaves out",
        "references that have targets but no usable mask, which are skipped",
    ]
    assert by_title["R-RefCOCO (unc)"].no_target["val"] == 1
    assert by_title["R-RefCOCO (unc)"].as_published is None
    assert not by_title["R-RefCOCO (unc)"].notes
    assert [part.title for part in verify(files.root, ["refcoco"]).benchmarks] == ["RefCOCO (unc)", "RefCOCO (google)"]
    assert len(verify(files.root / "refcoco").benchmarks) == 2


def test_published_counts_are_seen_when_they_are_met(files, monkeypatch):
    root = files.write("refcoco", "refs(unc).p", [files.ref(1, 1, "a", "b", split="testA")], [files.ann(1)])
    monkeypatch.setattr("gresbox.data.verification.published_counts", lambda *_: {"testA": Counts(1, 1, 2), "all": Counts(1)})
    report = verify(root).benchmarks[0]
    assert report.as_published is True
    assert "equal (references, pictures, sentences)" in str(report)
    assert "differs" not in str(report)


def test_the_published_counts_add_up():
    for folder, partition in (("refcoco", "unc"), ("refcoco+", "unc"), ("grefcoco", "unc")):
        counts = dict(published_counts(folder, partition))
        total = counts.pop("all")
        for place, value in enumerate(total[:2]):
            assert value is None or value == sum(one[place] for one in counts.values())
    assert set(BENCHMARKS) >= {"grefcoco", "refcoco", "refcoco+", "refcocog", "ref-zom", "rrefcoco", "rrefcoco+", "rrefcocog"}


def test_what_is_no_benchmark(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"verify: `root` must hold a folder of grefcoco, .* which holds none"):
        verify(tmp_path)
    with pytest.raises(ValueError, match=r"verify: `benchmarks` must be one of 'grefcoco', .*, got 'coco'"):
        verify(tmp_path, ["coco"])
    root = files.write("refcoco", "refs(unc).p", [files.ref(1, 1, "a")], [files.ann(1)])
    with pytest.raises(FileNotFoundError, match=r"verify: `root` must hold the RefCOCO\+ dataset"):
        verify(root, ["refcoco", "refcoco+"])
    refs = [files.ref(1, 1, "a")]
    del refs[0]["sentences"][0]["sent"]
    files.write("refcoco", "refs(unc).p", refs, [files.ann(1)])
    with pytest.raises(
        ValueError, match=r"verify: .*refs\(unc\)\.p holds an entry that is not of the released form \(KeyError\('sent'\)\)"
    ):
        verify(root)


def test_what_verify_passes_the_dataset_reads(files):
    refs = [files.ref(n, n, "a") for n in range(1, 5)]
    anns = [
        files.ann(1),
        files.ann(2, [files.wide, [1, 2]]),
        files.ann(3, encode_rle(np.eye(12, 16, dtype=bool))),
        files.ann(4, []),
    ]
    root = files.write("refcoco", "refs(unc).p", refs, anns)
    assert verify(root).ok
    with pytest.warns(UserWarning, match="2 annotations"):
        assert [int(sample.target.merged.sum()) for sample in RefCOCO(root, "refcoco", "val")] == [16, 24, 12]


def test_the_real_pictures(realdata):
    report = verify(realdata / "grefcoco_mini")
    assert report.ok
    assert report.benchmarks[0].counts["all"] == Counts(211, 26, 210)
    assert report.benchmarks[0].no_target["all"] == 52
    assert list(report.benchmarks[0].notes.values()) == [[200211]]
