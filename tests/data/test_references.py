import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import GRefCOCO, RefCOCO, RefZOM
from gresbox.data.masks import is_polygon
from gresbox.data.references import read_instances, usable_segmentation

numbers = (
    st.integers(-5, 700) | st.floats(0, 700).map(lambda number: round(number, 2)) | st.sampled_from([1e-7, 1e22, float("nan")])
)
polygons = st.lists(st.lists(numbers, max_size=9), max_size=4)


@given(st.lists(polygons, max_size=4), st.sampled_from([None, 1]), st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")]))
def test_polygons_left_as_bytes_are_those_of_the_whole_file(tmp_path_factory, segmentations, indent, separators):
    path = tmp_path_factory.mktemp("instances") / "instances.json"
    hostile = 'a "segmentation": [[1, 2]] in a string'
    annotations = [{"id": n, "image_id": 1, "segmentation": one, "note": hostile} for n, one in enumerate(segmentations)]
    annotations.append({"id": 99, "image_id": 1, "segmentation": {"size": [1, 2], "counts": [2]}})
    content = {"images": [{"id": 1, "file_name": hostile}], "annotations": annotations, "categories": []}
    path.write_text(json.dumps(content, indent=indent, separators=separators))
    read = read_instances("f", path)
    assert read.pictures[1]["file_name"] == hostile
    assert read.annotations[99]["segmentation"] == {"size": [1, 2], "counts": [2]}
    for number, expected in enumerate(segmentations):
        entry = read.annotations[number]
        assert entry.keys() == annotations[number].keys()
        usable, clean = usable_segmentation(entry["segmentation"])
        parts = [part for part in expected if is_polygon(part)]
        kept = json.loads(usable) if isinstance(usable, bytes) else usable
        assert repr(kept) == repr(parts or None)  # NaN is not equal to itself
        assert clean == (bool(parts) and len(parts) == len(expected))


def test_most_polygons_stay_bytes(files):
    root = files.write(
        "grefcoco", "grefs(unc).json", [], [files.ann(1), files.ann(2, [files.square, files.wide]), files.ann(3, [[1, 2]])]
    )
    read = read_instances("f", root / "grefcoco" / "instances.json").annotations
    assert [type(usable_segmentation(read[number]["segmentation"])[0]) for number in (1, 2, 3)] == [bytes, bytes, type(None)]


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert all(word in message for word in words), message


def broken(files, change, *, refs=None, anns=None, images=None):
    """A small dataset after ``change(refs, anns, images)``."""
    refs = [files.ref(1, [1], "the thing")] if refs is None else refs
    anns = [files.ann(1)] if anns is None else anns
    images = [{"id": 7, "file_name": files.name(7), "height": 12, "width": 16}]
    change(refs, anns, images)
    return files.write("grefcoco", "grefs(unc).json", refs, anns, images=images, pictures=None)


MALFORMED = {
    "a picture id that is text": (lambda r, a, i: r[0].update(image_id="7"), "needs picture 7, which"),
    "a picture id that is a list": (lambda r, a, i: r[0].update(image_id=[7]), "another form"),
    "an annotation id that is nowhere": (lambda r, a, i: r[0].update(ann_id=[5]), "needs annotation 5"),
    "an annotation id in a list in a list": (lambda r, a, i: r[0].update(ann_id=[[1]]), "another form"),
    "an annotation of another picture": (lambda r, a, i: a[0].update(image_id=8), "its annotation 1 is of picture 8"),
    "sentences that are none": (lambda r, a, i: r[0].update(sentences=3), "another form"),
    "sentences that are bare text": (lambda r, a, i: r[0].update(sentences=["the thing"]), "another form"),
    "a sentence that is a number": (lambda r, a, i: r[0]["sentences"][0].update(raw=5), "another form"),
    "a sentence without an id": (lambda r, a, i: r[0]["sentences"][0].pop("sent_id"), "without ('sent_id')"),
    "a split that is no text": (lambda r, a, i: r[0].update(split=1), "must be a list of references with"),
    "a picture without a height": (lambda r, a, i: i[0].update(height=None), "height and a width in pixels, got None and 16"),
    "a picture of no width": (lambda r, a, i: i[0].update(width=0), "height and a width in pixels, got 12 and 0"),
    "a picture without a name": (lambda r, a, i: i[0].pop("file_name"), "without ('file_name')"),
    "an annotation without an id": (lambda r, a, i: a[0].pop("id"), "without ('id')"),
    "annotations that are none": (lambda r, a, i: a.append(3), "another form"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_entry_is_one_clear_line(files, what):
    change, message = MALFORMED[what]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        GRefCOCO(broken(files, change), "val", images=False)
    one_line(caught, "GRefCOCO: ")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [12, 15], "counts": [180]}, "must be of size (12, 16), got (12, 15)"),
        ({"size": [12, 16], "counts": [100]}, "runs that fill 12 x 16 pixels, got a sum of 100"),
        ({"size": [12, 16], "counts": [-8, 200]}, "runs that fill 12 x 16 pixels"),
        ({"size": [12, 16], "counts": "é"}, "other characters or a cut text"),
        ({"size": [12, 16], "counts": [1.5, 190.5]}, "run-length text or a list of whole numbers"),
        ({"size": [12, 16]}, "run-length text or a list of whole numbers"),
        ({"counts": [192]}, "`size` must be a height and a width in pixels, got None"),
        ({"size": "12x16", "counts": [192]}, "`size` must be a height and a width in pixels, got '12x16'"),
    ],
)
def test_an_encoding_that_does_not_fit_is_one_clear_line(files, segmentation, message):
    data = GRefCOCO(broken(files, lambda r, a, i: a[0].update(segmentation=segmentation)), "val", images=False)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        data.target(0)
    one_line(caught, "GRefCOCO: reference 1 has a segmentation that cannot be read")


@pytest.mark.parametrize(
    "segmentation", [[], [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], None, 5, "x", [[float("nan")] * 6]]
)
def test_an_instance_without_any_valid_polygon_is_left_out(files, segmentation):
    with pytest.warns(
        UserWarning, match="1 annotations hold polygons of fewer than three points.*1 references have no usable"
    ) as caught:
        data = GRefCOCO(broken(files, lambda r, a, i: a[0].update(segmentation=segmentation)), "val", images=False)
    assert len(data) == 0
    assert len(caught) == 1


def test_polygons_as_text_that_only_looks_right_are_told_of_where_they_are_used(files):
    root = broken(files, lambda r, a, i: None)
    path = root / "grefcoco" / "instances.json"
    path.write_text(path.read_text().replace("[[1.0, 1, 5, 1,", "[[1-0, 1, 5, 1,"))
    with pytest.raises(ValueError, match="cannot be read") as caught:
        GRefCOCO(root, "val", images=False).target(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["instances.json", "refs(unc).p", "refs(unc).json"])
def test_a_cut_file_is_one_clear_line(files, name, part):
    refs = name if name != "instances.json" else "refs(unc).p"
    root = files.write("refcoco", refs, [files.ref(n, n, "the thing") for n in range(1, 9)], [files.ann(n) for n in range(1, 9)])
    path = root / "refcoco" / name
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"is not (JSON|a pickle of plain references)") as caught:
        RefCOCO(root, "refcoco", "val")
    one_line(caught, str(path))


def test_a_file_that_is_empty_or_something_else(files):
    root = files.write("ref-zom", "refs(final).p", [], [])
    with pytest.raises(ValueError, match="`split` must be one of , got 'test'"):
        RefZOM(root, "test")
    for content, message in ((b"", "is not a pickle"), (b"[]", "is not a pickle"), (b"(dp0\n.", "must be a list of references")):
        (root / "ref-zom" / "refs(final).p").write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            RefZOM(root, "test")
        one_line(caught, "refs(final).p")
    files.write("ref-zom", "refs(final).json", [files.ref(1, 1, "a", split="test")], [])
    (root / "ref-zom" / "refs(final).p").unlink()
    (root / "ref-zom" / "instances.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON") as caught:
        RefZOM(root, "test")
    one_line(caught, "instances.json")
