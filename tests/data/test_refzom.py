import pytest

from gresbox.data import RefZOM


def write(files, pictures="trainval2014", **more):
    refs = [
        files.ref(1, [1, 2], "both", source="many", split="test"),
        files.ref(2, 1, "one", source="one", split="test"),
        files.ref(3, [999], "none", "of it", source="zero", split="test"),  # its annotation is nowhere
        files.ref(4, [2], "in the other half", source="one", split="test", image_id=8),
        files.ref(5, [1], "elsewhere", source="one", split="train"),
    ]
    refs[3]["ann_id"] = [3]
    anns = [files.ann(1), files.ann(2, [files.wide]), files.ann(3, image_id=8)]
    images = [
        {"id": 7, "file_name": files.name(7), "height": 12, "width": 16},
        {"id": 8, "file_name": files.name(8, "val"), "height": 12, "width": 16},
    ]
    root = files.write("ref-zom", "refs(final).p", refs, anns, images=images, pictures=None, **more)
    for image, half in zip(images, ("train2014", "val2014"), strict=True):
        files.picture(pictures.format(half=half), image["file_name"])
    return root


@pytest.mark.parametrize(
    "pictures", ["images/trainval2014", "images/{half}", "{half}", "images/mscoco/images/trainval2014", "trainval2014"]
)
def test_kinds_come_from_the_source_and_pictures_from_both_halves(files, pictures):
    data = RefZOM(write(files, pictures), "test")
    assert [(one.text, one.kind, one.exists, len(one.target.masks)) for one in data] == [
        ("both", "many", True, 2),
        ("one", "one", True, 1),
        ("none", "zero", False, 0),
        ("of it", "zero", False, 0),
        ("in the other half", "one", True, 1),
    ]
    assert data[2].target.no_target
    assert not data[2].target.merged.any()
    assert len(RefZOM(files.root, "train")) == 1


def test_a_zero_has_no_target_though_its_annotation_exists(files):
    root = files.write("ref-zom", "refs(final).p", [files.ref(1, 1, "a", source="zero", split="test")], [files.ann(1)])
    assert RefZOM(root, "test").info(0)[4:6] == ("zero", False)
    assert len(RefZOM(root, "test").target(0).masks) == 0


def test_a_source_that_is_none(files):
    root = files.write("ref-zom", "refs(final).p", [files.ref(1, 1, "a", source="two", split="test")], [files.ann(1)])
    with pytest.raises(ValueError, match="RefZOM: reference 1 must have a source in zero, one, many, got 'two'"):
        RefZOM(root, "test")
    root = files.write("ref-zom", "refs(final).p", [files.ref(1, 1, "a", split="test")], [files.ann(1)])
    assert RefZOM(root, "test").info(0).kind == "one"  # as the released code takes it
