import pytest

from gresbox.data import GRefCOCO, RefCOCO, held_out_images


@pytest.fixture
def mixed(files):
    """Picture 1 is a test of RefCOCO and a training picture of gRefCOCO; 2 the other way round."""
    anns = [files.ann(number, image_id=number) for number in range(1, 6)]

    def refs(*splits):
        return [files.ref(n, n, f"picture {n}", split=split, image_id=n) for n, split in enumerate(splits, 1)]

    pictures = {"image_ids": (1, 2, 3, 4, 5)}
    files.write("refcoco", "refs(unc).p", refs("testA", "train", "train", "val"), anns, **pictures)
    files.write("refcoco", "refs(google).p", refs("train", "train", "test"), anns, **pictures)
    files.write("grefcoco", "grefs(unc).json", refs("train", "testB", "train", "train", "train"), anns, **pictures)
    return files.root


def test_the_union_of_all_evaluation_pictures(mixed):
    assert held_out_images(mixed) == {1, 2, 4}
    assert held_out_images(mixed, splits=("test",)) == {1, 2}
    assert held_out_images(mixed, ["grefcoco"]) == {2}
    assert held_out_images(mixed, ["refcoco(google)", "grefcoco"]) == {2, 3}


def test_a_mixed_training_without_leakage(mixed):
    held_out = held_out_images(mixed)
    sets = [GRefCOCO(mixed, "train", exclude_images=held_out), RefCOCO(mixed, "refcoco", "train", exclude_images=sorted(held_out))]
    assert [data.image_ids for data in sets] == [{3, 5}, {3}]
    assert [len(data) for data in sets] == [2, 1]
    leaking = GRefCOCO(mixed, "train").image_ids & RefCOCO(mixed, "refcoco", "testA").image_ids
    assert leaking == {1}


def test_what_is_not_there(mixed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"held_out_images: `root` must hold the RefCOCO\+ dataset"):
        held_out_images(mixed, ["refcoco+"])
    with pytest.raises(FileNotFoundError, match=r"held_out_images: `root` must hold a folder of grefcoco, .* which holds none"):
        held_out_images(tmp_path / "images")
    with pytest.raises(ValueError, match=r"held_out_images: `benchmarks` must be one of 'grefcoco', .*, got 'coco'"):
        held_out_images(mixed, ["coco"])
