import pytest

from gresbox.data import RRefCOCO


def refs(files):
    first = files.ref(1, 1, "the man", "the dog", "the boat")
    first["sentences"][1]["exist"] = False
    first["sentences"][2]["exist"] = True
    return [first, files.ref(2, [2], "the wide one"), files.ref(3, 1, "later", split="train")]


@pytest.mark.parametrize("given", ["refcoco", "rrefcoco"])
@pytest.mark.parametrize("ending", ["", "+", "g"])
def test_negative_sentences(files, given, ending):
    root = files.write(f"rrefcoco{ending}", "refs(unc).p", refs(files), [files.ann(1), files.ann(2, [files.wide])])
    data = RRefCOCO(root, given + ending, "val")
    assert data.name == f"rrefcoco{ending}"
    assert [(one.text, one.kind, one.exists, one.ref_id, int(one.target.merged.sum())) for one in data] == [
        ("the man", "one", True, 1, 16),
        ("the dog", "zero", False, 1, 0),
        ("the boat", "one", True, 1, 16),
        ("the wide one", "one", True, 2, 24),
    ]
    assert data[1].target.no_target
    assert tuple(data[1].target.masks.shape) == (0, 12, 16)
    assert [data.info(index).exists for index in range(4)] == [True, False, True, True]


def test_umd_is_taken_where_only_that_is_there(files):
    root = files.write("rrefcocog", "refs(umd).p", refs(files), [files.ann(1), files.ann(2)])
    assert len(RRefCOCO(root, "refcocog", "val")) == 4
    with pytest.raises(FileNotFoundError, match=r"RRefCOCO: `root` must hold the R-RefCOCOg dataset, .*\n.*\n.*refs\(unc\)\.p"):
        RRefCOCO(root, "refcocog", "val", "unc")


def test_refcoco_itself_is_not_taken_for_it(files):
    root = files.write("refcoco", "refs(unc).p", refs(files), [files.ann(1), files.ann(2)])
    for folder in (root, root / "refcoco"):
        with pytest.raises(FileNotFoundError, match="R-RefCOCO dataset"):
            RRefCOCO(folder, "refcoco", "val")
