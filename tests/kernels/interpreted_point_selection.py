"""The kernel of select_points, interpreted: the same indices as the definition, ties included."""

from __future__ import annotations

import math

import pytest
import torch

from gresbox.kernels import point_selection
from gresbox.ops import select_points


def both(score_map, count, **options):
    return tuple(select_points(score_map, count, backend=backend, **options) for backend in ("triton", "eager"))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernel's launches; its outputs start as nonsense, so that what is not written is seen."""
    found, prepare = [], point_selection._select_launch

    def watched(scores, indices, scale):
        indices.fill_(-7)
        found.append(prepare(scores, indices, scale))
        return found[-1]

    monkeypatch.setattr(point_selection, "_select_launch", watched)
    return found


@pytest.mark.parametrize(("shape", "count"), [((1, 1, 1), 1), ((2, 1, 7), 7), ((3, 5, 4), 1), ((2, 13, 11), 12), ((1, 24, 30), 4)])
@pytest.mark.parametrize("weight", [0.0, 0.003, 0.7, 1e30])
def test_indices_are_the_definitions(launches, shape, count, weight):
    score_map = torch.randn(shape)
    for options in ({}, {"normalize_distance": False}, {"apply_sigmoid": False}):
        got, want = both(score_map, count, distance_weight=weight, **options)
        assert torch.equal(got, want)
    assert len(launches) == 3 and not launches[0].fp_fusion


@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0, 50.0])
def test_ties_go_to_the_lowest_index(weight):
    """Few values, and distances that are equal in pairs, make most sums equal."""
    for score_map in (torch.zeros(1, 9, 9), torch.randint(0, 2, (2, 8, 11)).float()):
        got, want = both(score_map, 25, distance_weight=weight)
        assert torch.equal(got, want)
    scores = torch.full((1, 6, 6), -3.0)
    scores[0, 0, 0] = 9.0
    scores[0, 3, 4] = scores[0, 4, 3] = scores[0, 5, 0] = scores[0, 0, 5] = 3.0
    assert both(scores, 2, distance_weight=0.01)[0].tolist() == [[0, 5]]


@pytest.mark.parametrize("squashed", [True, False])
def test_what_is_no_number(squashed):
    inf, nan = math.inf, math.nan
    for row in ([nan, 1.0, -inf, inf, nan, 0.5], [nan] * 6, [-inf] * 6, [inf] * 6, [3.4e38, inf, -3.4e38, -inf, 0.0, nan]):
        got, want = both(torch.tensor(row).view(1, 2, 3), 6, apply_sigmoid=squashed, distance_weight=0.5)
        assert torch.equal(got, want)
        assert sorted(got[0].tolist()) == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_strides(dtype):
    score_map = torch.randn(3, 12, 7).to(dtype)
    assert torch.equal(*both(score_map, 9))
    assert torch.equal(*both(score_map.mT, 9))
    assert torch.equal(*both(score_map[1:, ::2, 1:6], 9))
    assert torch.equal(*both(torch.randn(5, 6).to(dtype).expand(2, 5, 6), 30, apply_sigmoid=False))


def test_no_images():
    assert both(torch.zeros(0, 3, 3), 2)[0].shape == (0, 2)


def test_what_the_kernel_refuses():
    large = torch.randn(1, 64, 130)
    with pytest.raises(RuntimeError, match=r"^select_points: backend='triton' is not possible here: the map has 8320 cells and"):
        select_points(large, 2, backend="triton")
    assert torch.equal(select_points(large, 2), select_points(large, 2, backend="eager"))
    with pytest.raises(RuntimeError, match=r"some input is float64"):
        select_points(torch.zeros(1, 3, 3, dtype=torch.float64), 2, backend="triton")


def test_auto_is_the_kernel(launches):
    select_points(torch.randn(1, 4, 4), 2)
    assert len(launches) == 1
