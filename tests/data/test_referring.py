import json
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gresbox.data import GRefCOCO, RefCOCO, collate
from gresbox.data.masks import decode_rle, encode_rle, rasterise_polygons

PART = [1.3, 1.2, 9.8, 2.1, 11.4, 8.7, 3.3, 9.9]


def both(files):
    """The same polygon as gRefCOCO and as RefCOCO."""
    for folder, name in (("grefcoco", "grefs(unc).json"), ("refcoco", "refs(unc).p")):
        files.write(folder, name, [files.ref(1, [1], "a")], [files.ann(1, [PART])])
    return files.root


def test_at_another_size_grefcoco_scales_the_polygons_and_refcoco_resizes_the_mask(files):
    root = both(files)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "images/train2014" / files.name(7))
    scaled = [number * (20 / 16, 20 / 12)[place % 2] for place, number in enumerate(PART)]
    ready = Image.fromarray(rasterise_polygons([PART], 12, 16).astype(np.uint8))
    nearest = np.array(ready.resize((20, 20), Image.Resampling.NEAREST)).astype(bool)
    gres, res = GRefCOCO(root, "val", size=20), RefCOCO(root, "refcoco", "val", size=20)
    assert (gres[0].target.merged.numpy() == rasterise_polygons([scaled], 20, 20)).all()
    assert (res[0].target.merged.numpy() == nearest).all()
    assert (gres[0].target.merged != res[0].target.merged).any()
    picture = Image.open(root / "images/train2014" / files.name(7)).convert("RGB").resize((20, 20), Image.Resampling.BILINEAR)
    for data in (gres, res):
        assert (data[0].image.permute(1, 2, 0).numpy() == np.array(picture)).all()
        assert data.info(0).size == (20, 20)
        assert (data.target(0).merged == data[0].target.merged).all()
    assert GRefCOCO(root, "val").info(0).size == (12, 16)


def test_an_encoding_is_resized_as_a_mask(files):
    mask = np.zeros((12, 16), dtype=bool)
    mask[3:7, 2:9] = True
    root = files.write("grefcoco", "grefs(unc).json", [files.ref(1, [1], "a")], [files.ann(1, encode_rle(mask))])
    expected = np.array(Image.fromarray(mask.astype(np.uint8)).resize((30, 30), Image.Resampling.NEAREST)).astype(bool)
    assert (GRefCOCO(root, "val", size=30)[0].target.merged.numpy() == expected).all()


def test_no_target_at_another_size(files):
    root = files.write("grefcoco", "grefs(unc).json", [files.ref(1, [-1], "a")], [])
    assert tuple(GRefCOCO(root, "val", size=30)[0].target.masks.shape) == (0, 30, 30)


def test_excluded_pictures_are_not_looked_at(files):
    refs = [files.ref(1, [1], "a"), files.ref(2, [99], "b", image_id=8)]  # 8 is not even listed
    root = files.write("grefcoco", "grefs(unc).json", refs, [files.ann(1)])
    data = GRefCOCO(root, "val", exclude_images={8})
    assert (len(data), data.image_ids) == (1, {7})
    assert len(GRefCOCO(root, "val", exclude_images=[7, 8])) == 0


def test_workers_and_copies_give_the_same_samples(files):
    root = both(files)
    refs = [files.ref(n, [1], f"number {n}", "again") for n in range(3)]
    files.write("grefcoco", "grefs(unc).json", refs, [files.ann(1, [PART])])
    data = GRefCOCO(root, "val")
    copied = pickle.loads(pickle.dumps(data))
    loader = DataLoader(copied, batch_size=4, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert [text for batch in batches for text in batch.texts] == [sample.text for sample in data]
    assert all((target.merged == data[0].target.merged).all() for batch in batches for target in batch.targets)


def test_collate_pads_tokens(files):
    def tokenize(texts):
        longest = max(len(text) for text in texts)
        ids = torch.tensor([[ord(letter) for letter in text.ljust(longest, "\0")] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    root = files.write("grefcoco", "grefs(unc).json", [files.ref(1, [-1], "ab", "abc")], [])
    batch = partial(collate, tokenize=tokenize)(list(GRefCOCO(root, "val")))
    assert batch.tokens["input_ids"].tolist() == [[97, 98, 0], [97, 98, 99]]
    assert batch.tokens["attention_mask"].sum(1).tolist() == [2, 3]
    assert collate(list(GRefCOCO(root, "val"))).tokens == {}


def test_the_warning_names_what_was_left_out_once_and_where(files):
    refs = [files.ref(1, [1], "a"), files.ref(2, [2], "b"), files.ref(1, [1], "a again")]
    root = files.write("grefcoco", "grefs(unc).json", refs, [files.ann(1), files.ann(2, [[0, 0, 1, 1]])])
    with pytest.warns(UserWarning, match="GRefCOCO: ") as caught:
        data = GRefCOCO(root, "val")
    assert [str(one.message) for one in caught] == [
        "GRefCOCO: 1 annotations hold polygons of fewer than three points, which are left out; "
        "1 references have no usable mask and are skipped; 1 sentence ids occur more than once."
    ]
    assert caught[0].filename == __file__
    assert [data.text(index) for index in range(2)] == ["a", "a again"]


def test_sentences_that_say_nothing_are_skipped(files):
    refs = [files.ref(1, [1], "a", " ", "b"), files.ref(2, [1]), files.ref(3, [1], "")]
    data = GRefCOCO(files.write("grefcoco", "grefs(unc).json", refs, [files.ann(1)]), "val")
    assert [sample.text for sample in data] == ["a", "b"]


def test_all_crowds_and_all_degenerate(files):
    refs = [files.ref(1, [1], "crowd"), files.ref(2, [1, 2], "crowd and one"), files.ref(3, [3, 4], "nothing usable")]
    anns = [files.ann(1, iscrowd=1), files.ann(2), files.ann(3, []), files.ann(4, [[1, 2, 3, 4, 5]])]
    with pytest.warns(UserWarning, match="2 annotations hold polygons .* 2 references have no usable mask"):
        data = GRefCOCO(files.write("grefcoco", "grefs(unc).json", refs, anns), "val")
    assert [(sample.text, sample.kind) for sample in data] == [("crowd and one", "one")]


def test_every_union_mask_of_the_real_pictures_is_pycocotools_merge(realdata):
    coco = pytest.importorskip("pycocotools.mask")
    root = realdata / "grefcoco_mini"
    content = json.loads((root / "grefcoco" / "instances.json").read_text())
    known = {annotation["id"]: annotation for annotation in content["annotations"]}
    numbers = {ref["ref_id"]: ref["ann_id"] for ref in json.loads((root / "grefcoco" / "grefs(unc).json").read_text())}
    seen = 0
    for split in ("train", "val", "testA", "testB"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            data, square = GRefCOCO(root, split, images=False), GRefCOCO(root, split, images=False, size=480)
        for index in range(len(data)):
            info = data.info(index)
            height, width = info.size
            parts = [part for number in numbers[info.ref_id] if number != -1 for part in known[number]["segmentation"]]
            scaled = [[x * (480 / width, 480 / height)[place % 2] for place, x in enumerate(part)] for part in parts]
            for mask, polygons, size in (
                (data.target(index).merged, parts, info.size),
                (square.target(index).merged, scaled, (480, 480)),
            ):
                expected = np.zeros(size, dtype=bool)
                if polygons:
                    expected = decode_rle(coco.merge(coco.frPyObjects(polygons, *size)))
                assert (mask.numpy() == expected).all()
                seen += 1
    assert seen == 420
