from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data import SyntheticGRES
from gresbox.data.corruptions import CORRUPTIONS, Corrupt, corrupt_image
from gresbox.structures import GresSample, GresTarget
from gresbox.training.batches import make_loader

NAMES = pytest.mark.parametrize("name", CORRUPTIONS)


def picture(size: tuple[int, int] = (48, 64), seed: int = 0) -> torch.Tensor:
    """A smooth scene with an edge in it."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    planes = torch.stack([rows, columns, 0.5 + 0.3 * torch.sin(6 * (rows + columns) + seed)])
    planes[:, : size[0] // 2, : size[1] // 2] *= 0.5
    return (planes * 255).to(torch.uint8)


def distance(image: torch.Tensor, other: torch.Tensor) -> float:
    return (image.float() - other.float()).square().mean().sqrt().item()


@NAMES
def test_more_severity_is_farther_from_the_clean_picture(name):
    far = [distance(picture(), corrupt_image(picture(), name, severity, seed=3)) for severity in range(1, 6)]
    assert far == sorted(far)
    assert far[0] > 0
    assert far[4] > 1.5 * far[0]


@given(
    name=st.sampled_from(sorted(CORRUPTIONS)),
    severity=st.integers(1, 5),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(-(2**40), 2**64),
)
def test_any_size_gives_the_same_bytes_again_and_leaves_the_picture_alone(name, severity, size, seed):
    image = picture(size)
    before, state, numpy_state = image.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    spoilt = corrupt_image(image, name, severity, seed=seed)
    assert spoilt.shape == image.shape
    assert spoilt.dtype == torch.uint8
    assert torch.equal(spoilt, corrupt_image(image, name, severity, seed=seed))
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@NAMES
def test_the_seed_chooses_where_there_is_a_choice(name):
    spoilt = {corrupt_image(picture(), name, 3, seed=seed).numpy().tobytes() for seed in range(8)}
    assert len(spoilt) == {"blur": 1, "haze": 1, "low_light": 1}.get(name, len(spoilt))
    assert len(spoilt) > 3 or name in ("blur", "haze", "low_light")


@pytest.mark.parametrize("severity", range(1, 6))
def test_strengths_are_what_they_say(severity):
    grey, strength = torch.full((3, 112, 112), 128, dtype=torch.uint8), {n: s[severity - 1] for n, s in CORRUPTIONS.items()}
    for seed in range(5):
        covered = (corrupt_image(grey, "occlusion", severity, seed=seed) != 128).any(0).float().mean().item()
        assert covered == pytest.approx(strength["occlusion"], abs=0.02)
        dropped = corrupt_image(grey, "block_dropout", severity, seed=seed)[0] == 124
        assert dropped.sum() == int(strength["block_dropout"] * 14 * 14) * 64
    noisy = corrupt_image(grey, "gaussian_noise", severity).float() - 128
    inside = 2 * strength["gaussian_noise"] * 255 < 127  # else much is cut at black and white
    assert noisy.std().item() == pytest.approx(255 * strength["gaussian_noise"], rel=0.02) or not inside
    assert abs(noisy.mean().item()) < 2
    dot = torch.zeros(3, 112, 112, dtype=torch.uint8)
    dot[:, :, 56:] = 255
    edge = corrupt_image(dot, "blur", severity)[0, 50].float() / 255
    spread = edge.diff()
    at = torch.arange(111) - 55.0
    assert (spread * at.square()).sum().sqrt().item() == pytest.approx(strength["blur"] * 112, rel=0.15)
    ratios = (corrupt_image(torch.full((3, 4, 4), 100, dtype=torch.uint8), "colour_shift", severity).float()[:, 0, 0] / 100).log()
    assert ratios.sort().values.tolist() == pytest.approx([-strength["colour_shift"], 0, strength["colour_shift"]], abs=0.01)
    black = corrupt_image(torch.zeros(3, 10, 4, dtype=torch.uint8), "haze", severity).float() / 230
    assert black[0, 0, 0].item() == pytest.approx(1 - np.exp(-strength["haze"]), abs=0.005)
    assert black[0, -1, 0].item() == pytest.approx(1 - np.exp(-strength["haze"] / 2), abs=0.005)
    white = corrupt_image(torch.full((3, 4, 4), 255, dtype=torch.uint8), "low_light", severity)
    assert white[0, 0, 0].item() == round(255 * strength["low_light"])


def test_a_higher_severity_drops_the_same_blocks_and_more():
    grey = torch.full((3, 100, 100), 7, dtype=torch.uint8)
    for seed in range(10):
        masks = [(corrupt_image(grey, "block_dropout", severity, seed=seed) != 7).any(0) for severity in range(1, 6)]
        assert all((less <= more).all() for less, more in itertools.pairwise(masks))


@NAMES
def test_a_sample_keeps_its_truth_and_its_corruption_wherever_it_is_fetched(name):
    data = SyntheticGRES("val", 4, transform=Corrupt(name, 4))
    clean = SyntheticGRES("val", 4)
    for index in range(2):
        sample = data[index]
        assert torch.equal(sample.target.masks, clean[index].target.masks)
        assert sample.text == clean[index].text
        assert not torch.equal(sample.image, clean[index].image)
    if name == "gaussian_noise":
        loader = make_loader(data, [[(0, 2)], [(1, 3)]], lambda samples: samples[0].image, workers=1)
        assert all(torch.equal(image, data[index].image) for index, image in zip((2, 3), loader, strict=True))


def test_all_expressions_of_a_picture_see_the_same_picture():
    target = GresTarget(torch.zeros(0, 48, 64, dtype=torch.bool))
    spoil = Corrupt("occlusion", 3)
    same = [spoil(GresSample(picture(), text, target, image_id=5, sent_id=index)) for index, text in enumerate(("a", "b"))]
    assert torch.equal(same[0].image, same[1].image)
    assert not torch.equal(spoil(GresSample(picture(), "a", target, image_id=6)).image, same[0].image)
    assert not torch.equal(Corrupt("occlusion", 3, seed=1)(same[0]).image, spoil(GresSample(picture(), "a", target)).image)


BAD = {
    "name": (lambda: Corrupt("fog"), ValueError, "Corrupt: `name` must be one of 'occlusion', 'gaussian_noise'"),
    "severity": (lambda: Corrupt("haze", 6), ValueError, "Corrupt: `severity` must be in [1, 5], got 6."),
    "no severity": (lambda: corrupt_image(picture(), "haze", 0), ValueError, "corrupt_image: `severity` must be in [1, 5], got 0."),
    "half": (lambda: Corrupt("haze", 2.5), TypeError, "Corrupt: `severity` must be a whole number, got 2.5."),
    "floats": (lambda: corrupt_image(picture().float(), "haze", 1), TypeError, "`image` must be uint8, got torch.float32."),
    "grey": (lambda: corrupt_image(picture()[:1], "haze", 1), ValueError, "`image` must be (3, H, W), got (1, 48, 64)."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, expected = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
