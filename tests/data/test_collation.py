import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from gresbox.data import Resize, SyntheticGRES, collate
from gresbox.structures import GresSample, GresTarget


def test_fields_stand_side_by_side():
    data = SyntheticGRES("val", 6)
    samples = [data[index] for index in range(6)]
    batch = collate(samples)
    assert len(batch) == 6
    assert batch.images.shape == (6, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    for index, sample in enumerate(samples):
        assert (batch.images[index] == sample.image).all()
        assert batch.targets[index] is sample.target
        assert (batch.texts[index], batch.kinds[index], batch.exists[index]) == (sample.text, sample.kind, sample.exists)
        assert (batch.image_ids[index], batch.ref_ids[index], batch.sent_ids[index]) == (sample.image_id,) * 3


def test_pictures_of_several_sizes_stay_a_list():
    samples = [
        GresSample(torch.zeros(3, side, 8, dtype=torch.uint8), "x", GresTarget(torch.zeros(0, side, 8) > 0)) for side in (4, 8)
    ]
    batch = collate(samples)
    assert isinstance(batch.images, list)
    assert [tuple(image.shape) for image in batch.images] == [(3, 4, 8), (3, 8, 8)]


def test_no_samples():
    with pytest.raises(ValueError, match="collate: `samples` must be at least one sample, got none"):
        collate([])


def test_a_batch_can_be_pickled():
    data = SyntheticGRES("val", 2, transform=Resize(32))
    batch = pickle.loads(pickle.dumps(collate([data[0], data[1]])))
    assert (batch.targets[0].masks == data[0].target.masks).all()
    assert batch.targets[1].no_target == data[1].target.no_target


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_same_batches(start):
    data = SyntheticGRES("val", 8, level="full", transform=Resize(48))
    loader = DataLoader(data, batch_size=4, collate_fn=collate, num_workers=1, multiprocessing_context=start)
    for number, batch in enumerate(loader):
        plain = collate([data[4 * number + place] for place in range(4)])
        assert (batch.images == plain.images).all()
        assert batch.texts == plain.texts
        assert all((a.masks == b.masks).all() for a, b in zip(batch.targets, plain.targets, strict=True))
