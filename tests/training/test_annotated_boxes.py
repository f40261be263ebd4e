from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import Subset

from gresbox.data import GRefCOCO, SyntheticGRES, synthesize
from gresbox.training import Answer, Scorer
from gresbox.training.annotated_boxes import read_annotated_boxes
from gresbox.training.batches import truth_of


@pytest.fixture
def root(tmp_path):
    return synthesize(tmp_path / "shapes", sizes={"train": 2, "val": 12})


def edit(root, change):
    path = root / "grefcoco" / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_boxes_of_tight_annotations_are_those_of_the_masks(root):
    data = GRefCOCO(root, "val", images=False)
    boxes = read_annotated_boxes(data)
    assert len(boxes) == 12
    for index in range(12):
        truth = truth_of(data.target(index), data.info(index))
        assert torch.allclose(boxes[truth.ref_id].float() * 64, truth.boxes_xyxy, atol=1e-4)


def test_what_has_no_proper_box_is_absent(root):
    data = GRefCOCO(root, "val", images=False)
    wanted = {data.info(index).ref_id for index in range(12) if data.info(index).kind == "zero"}
    assert wanted
    for spoilt in (None, [1, 2, 3], "box", [1, 2, -3, 4], [1, 2, None, 4]):
        edit(root, lambda content, spoilt=spoilt: [one.update(bbox=spoilt) for one in content["annotations"]])
        assert set(read_annotated_boxes(data)) == wanted
    edit(root, lambda content: [one.update(bbox=[0, 0, 1, 1], iscrowd=1) for one in content["annotations"]])
    assert all(not len(boxes) for boxes in read_annotated_boxes(data).values())


def test_data_without_files_has_none():
    assert read_annotated_boxes(SyntheticGRES("val", 2)) == {}
    assert read_annotated_boxes([]) == {}


@pytest.mark.parametrize("size", [None, 32])
def test_detection_is_scored_against_the_files_boxes(root, size):
    edit(root, lambda content: [one.update(bbox=[8, 16, 24, 32]) for one in content["annotations"]])
    data = GRefCOCO(root, "val", images=False, size=size)
    single = [index for index in range(12) if data.info(index).kind == "one"]
    scorer = Scorer(Subset(data, single), "grec")
    truths = [truth_of(data.target(index), data.info(index)) for index in single]
    box = torch.tensor([[8.0, 16.0, 32.0, 48.0]]) * (1.0 if size is None else 0.5)
    score = torch.tensor([0.9]).double()
    scorer.add([Answer(truth.sent_id, None, 0.1, box, score) for truth in truths], truths, single)
    with pytest.warns(UserWarning, match="N_acc"):
        assert scorer.compute()["F1"] == 100
