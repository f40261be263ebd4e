import pytest

from gresbox.data import GRefCOCO, RefCOCO
from gresbox.data.folders import PICTURE_FOLDERS, find_datasets


def write(files, folder="refcoco", name="refs(unc).p", **more):
    return files.write(folder, name, [files.ref(1, 1, "a")], [files.ann(1)], **more)


@pytest.mark.parametrize("pictures", PICTURE_FOLDERS)
@pytest.mark.parametrize("inner", ["", "refcoco"])
def test_where_pictures_may_be(files, pictures, inner):
    root = write(files, pictures=pictures)
    assert RefCOCO(root / inner, "refcoco", "val")[0].image.shape == (3, 12, 16)


def test_pictures_elsewhere_are_given(files, tmp_path):
    root = write(files, pictures="../coco/train2014")
    with pytest.raises(FileNotFoundError, match="got none of these folders"):
        RefCOCO(root, "refcoco", "val")
    for images in (tmp_path / "../coco", str(tmp_path / "../coco/train2014")):
        assert RefCOCO(root, "refcoco", "val", images=images)[0].image.shape == (3, 12, 16)
    with pytest.raises(FileNotFoundError, match="RefCOCO: `images` must be a folder of pictures, got nowhere, which is none"):
        RefCOCO(root, "refcoco", "val", images="nowhere")
    with pytest.raises(FileNotFoundError, match=r"1 of 1 pictures are missing in .*, for example COCO_train2014_000000000007\.jpg"):
        RefCOCO(root, "refcoco", "val", images=tmp_path)


def test_pictures_may_lie_in_several_folders(files):
    refs = [files.ref(1, 1, "a"), files.ref(2, 2, "b", image_id=8)]
    root = files.write("refcoco", "refs(unc).p", refs, [files.ann(1), files.ann(2, image_id=8)], image_ids=(7, 8), pictures=None)
    files.picture("images/train2014", files.name(7), (0, 0, 255))
    with pytest.raises(FileNotFoundError, match="1 of 2 pictures are missing"):
        RefCOCO(root, "refcoco", "val")
    files.picture("train2014", files.name(8), (255, 0, 0))
    data = RefCOCO(root, "refcoco", "val")
    assert [int(data[index].image.float().mean((1, 2)).argmax()) for index in range(2)] == [2, 0]


def test_the_message_shows_what_was_expected_and_what_is_there(files):
    write(files, "refcoco+", "refs(google).p")
    (files.root / "README.txt").touch()
    with pytest.raises(FileNotFoundError) as caught:
        RefCOCO(files.root, "refcoco+", "val")
    assert str(caught.value) == (
        f"RefCOCO: `root` must hold the RefCOCO+ dataset, got {files.root}.\n"
        "expected:\n"
        "  ROOT/refcoco+/refs(unc).p     (or refs(unc).json)\n"
        "  ROOT/refcoco+/instances.json\n"
        "  ROOT/images/train2014/*.jpg   (or images/mscoco/images/train2014, images/mscoco/train2014, train2014;"
        " also trainval2014 and val2014)\n"
        "found in ROOT: README.txt, images/, refcoco+/; in ROOT/refcoco+: instances.json, refs(google).p;"
        " in ROOT/images: train2014/"
    )
    with pytest.raises(FileNotFoundError, match=r"must hold RefCOCO\+ split by umd.*\n.*\n.*refs\(umd\)\.p"):
        RefCOCO(files.root, "refcoco+", "val", "umd")
    for number in range(20):
        (files.root / f"file-{number:02d}").touch()
    with pytest.raises(FileNotFoundError, match=r"found in ROOT: README\.txt, file-00, .* and 11 more"):
        RefCOCO(files.root, "refcoco", "val")


def test_a_folder_is_not_taken_for_a_relative_that_calls_its_files_alike(files):
    root = write(files, "refcoco+")
    assert len(RefCOCO(root / "refcoco+", "refcoco+", "val")) == 1
    with pytest.raises(FileNotFoundError, match="the RefCOCO dataset"):
        RefCOCO(root / "refcoco+", "refcoco", "val")


def test_references_without_instances_are_not_enough(files):
    root = write(files, "grefcoco", "grefs(unc).json")
    (root / "grefcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"in ROOT/grefcoco: grefs\(unc\)\.json"):
        GRefCOCO(root, "val")


def test_every_benchmark_in_a_folder_is_found(files):
    write(files, "refcoco")
    write(files, "refcoco", "refs(google).p")
    write(files, "grefcoco", "grefs(unc).p")
    found = [(benchmark.title, one.partition) for benchmark, one in find_datasets(files.root)]
    assert found == [("gRefCOCO", "unc"), ("RefCOCO", "unc"), ("RefCOCO", "google")]
