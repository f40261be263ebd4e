from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from gresbox.data import SyntheticGRES
from gresbox.structures import GresTarget
from gresbox.training.batches import EvaluationCollate, TrainingCollate, make_loader, resize_target


def test_packed_targets_come_back(tiny):
    processor = tiny.tiny_model().processor
    data = SyntheticGRES("train", 24, image_size=64)
    samples = [data[index] for index in range(24)]
    assert {sample.kind for sample in samples} == {"zero", "one", "many"}
    inputs, targets = TrainingCollate(processor)(samples).on(torch.device("cpu"))
    assert tuple(inputs["images"].shape) == (24, 3, 64, 64)
    for sample, target in zip(samples, targets, strict=True):
        assert torch.equal(target.masks, sample.target.masks)
        assert torch.equal(target.merged, sample.target.merged)
        assert torch.equal(target.boxes, sample.target.boxes)
        assert target.no_target == sample.target.no_target


def test_targets_follow_the_pictures_to_the_models_size(tiny):
    processor = tiny.tiny_model().processor
    data = SyntheticGRES("train", 4, image_size=96)
    samples = [data[index] for index in range(4)]
    batch = TrainingCollate(processor)(samples)
    assert tuple(batch.merged.shape) == (4, 64, 64)
    assert sum(batch.counts) == len(batch.masks) == len(batch.boxes)
    assert [truth.mask.shape[0] for truth in EvaluationCollate(processor)(samples).truths] == [96] * 4
    assert EvaluationCollate(processor, resized=True)(samples).sizes == [(64, 64)] * 4


def test_what_is_in_the_union_alone_survives_resizing():
    crowd = torch.zeros(8, 8, dtype=torch.bool)
    crowd[:, :4] = True
    target = resize_target(GresTarget(torch.zeros(0, 8, 8, dtype=torch.bool), merged=crowd, no_target=False), (4, 4))
    assert target.merged.sum() == 8
    assert target.no_target is False


class Draws:
    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - what others' data sets do


@pytest.mark.parametrize("first", [0, 2])
def test_workers_draw_the_same_numbers_wherever_they_start(first):
    batches = [[(2 * step, 5), (2 * step + 1, 6)] for step in range(4)]
    whole = list(make_loader(Draws(), batches, list, workers=1, seed=3))
    part = list(make_loader(Draws(), batches[first:], list, workers=2, seed=3))
    assert whole[first:] == part
    assert len({numbers for batch in whole for numbers in batch}) == 8
    assert whole != list(make_loader(Draws(), batches, list, workers=1, seed=4))


def test_loading_leaves_the_global_generators_alone(tiny):
    data, collate = SyntheticGRES("train", 4, image_size=64), TrainingCollate(tiny.tiny_model().processor)
    before = torch.get_rng_state()
    list(make_loader(data, [[(0, 0)], [(1, 3)]], collate))
    list(make_loader(data, [[(0, 0)], [(1, 3)]], collate, workers=1))
    assert torch.equal(torch.get_rng_state(), before)
