import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import SyntheticGRES
from gresbox.data.expressions import KINDS

SHA256 = {
    "basic": "bbc8e386ffb55ab1fb054095c66e026583907caf3b51985aedc8565eda36f4a8",
    "full": "3677d8d9f8f2d609d07ccac351bc2f357b1c45dfec1b9dd216dc154d87056fb1",
}


def digest(data):
    total = hashlib.sha256()
    for index in range(len(data)):
        sample = data[index]
        total.update(sample.image.numpy().tobytes())
        total.update(np.packbits(sample.target.masks.numpy()).tobytes())
        total.update(f"{tuple(sample.target.masks.shape)} {sample.text}\n".encode())
    return total.hexdigest()


@pytest.mark.parametrize("level", list(SHA256))
def test_the_first_hundred_samples_never_change(level):
    assert digest(SyntheticGRES("val", 100, level=level, seed=0)) == SHA256[level]


def test_the_bytes_do_not_depend_on_the_process():
    code = (
        "from tests.data.test_synthetic import digest, SyntheticGRES, SHA256\n"
        "assert digest(SyntheticGRES('val', 100, level='full')) == SHA256['full']"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root, timeout=120)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["basic", "full"]),
    st.sampled_from(["train", "val", "testA", "testB"]),
    st.integers(0, 50),
)
def test_a_sample_depends_on_its_place_alone(seed, level, split, index):
    one = SyntheticGRES(split, 51, level=level, seed=seed)[index]
    two = SyntheticGRES(split, 1000, level=level, seed=seed)
    _ = two[index + 1]
    other = two[index]
    assert (one.image == other.image).all()
    assert (one.target.masks == other.target.masks).all()
    assert (one.text, one.image_id) == (other.text, other.image_id)


@given(st.integers(0, 10**6), st.sampled_from(["basic", "full"]), st.sampled_from(["train", "val", "testA", "testB"]))
def test_a_sample_agrees_with_itself(seed, level, split):
    sample = SyntheticGRES(split, 10, level=level, seed=seed)[seed % 10]
    target = sample.target
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.uint8
    assert sample.image.is_contiguous()
    assert target.masks.dtype == torch.bool
    assert target.masks.sum(0).max() <= 1 if len(target.masks) else True
    assert target.masks.flatten(1).any(1).all()
    assert sample.kind == KINDS[min(len(target.masks), 2)]
    assert sample.exists == (sample.kind != "zero") == (not target.no_target)


@pytest.mark.parametrize("level", ["basic", "full"])
def test_splits_and_seeds_share_no_picture(level):
    groups = [SyntheticGRES(split, 60, level=level, seed=seed) for split in ("train", "val", "testA", "testB") for seed in (0, 1)]
    pictures = [data[index].image.numpy().tobytes() for data in groups for index in range(len(data))]
    assert len(set(pictures)) == len(pictures)
    ids = [data[index].image_id for data in groups[::2] for index in range(len(data))]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("proportions", [(0.15, 0.5, 0.35), (0.0, 1.0, 0.0), (0.5, 0.0, 0.5)])
def test_proportions_are_kept(proportions):
    data = SyntheticGRES("train", 2000, proportions=proportions)
    counts = Counter(min(len(data.scene(index)[1].targets), 2) for index in range(len(data)))
    for kind, share in enumerate(proportions):
        spread = (share * (1 - share) / len(data)) ** 0.5
        assert abs(counts[kind] / len(data) - share) <= 4 * spread


def test_size_and_negative_indices_and_transform():
    data = SyntheticGRES("val", 5, transform=lambda sample: sample.text)
    assert len(data) == 5
    assert data[-1] == data[4] == SyntheticGRES("val", 100)[4].text
    assert len(list(data)) == 5  # iteration ends by IndexError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "`split` must be one of 'train', 'val', 'testA', 'testB', got 'test'."),
        ({"level": "hard"}, "`level` must be one of 'basic', 'full', got 'hard'."),
        ({"size": -1}, r"`size` must be in \[0, 999999999\], got -1."),
        ({"image_size": 8}, r"`image_size` must be in \[32, 4096\], got 8."),
        ({"proportions": (0.5, 0.5, 0.5)}, "`proportions` must be three shares that sum to 1"),
        ({"proportions": (1.5, -0.5, 0.0)}, "`proportions` must be three shares that sum to 1"),
        ({"proportions": (float("nan"), 0.5, 0.5)}, "`proportions` must be three shares that sum to 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"SyntheticGRES: {message}"):
        SyntheticGRES(**({"split": "val", "size": 3} | arguments))


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match="must be below 3"):
        SyntheticGRES("val", 3)[index]
