"""CoverageAccuracy: borders, pictures without boxes, and numbers that are not where they should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.metrics import CoverageAccuracy, coverage_accuracy
from gresbox.ops import box_xyxy_to_cxcywh

TENTHS = st.integers(0, 10)


@given(
    st.lists(st.tuples(TENTHS, TENTHS), min_size=1, max_size=5),
    st.lists(st.tuples(TENTHS, TENTHS, TENTHS, TENTHS), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_point_on_the_border_is_inside_in_either_precision(points, corners, dtype):
    corners = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    covered = [any(x1 <= x <= x2 and y1 <= y <= y2 for x, y in points) for x1, y1, x2, y2 in corners]
    boxes = box_xyxy_to_cxcywh(torch.tensor(corners, dtype=dtype) / 10)
    got = coverage_accuracy((torch.tensor(points, dtype=dtype) / 10)[None], [boxes], per_sample=True)
    assert int(got["covered"]) == sum(covered)
    assert float(got["CoverAcc"]) == pytest.approx(100 * sum(covered) / len(covered), abs=1e-10)


def test_the_mean_is_over_pictures_and_those_without_a_box_are_left_out():
    points = torch.tensor([[[0.1, 0.1]]]).expand(3, 1, 2)
    near, far = torch.tensor([0.1, 0.1, 0.1, 0.1]), torch.tensor([0.9, 0.9, 0.1, 0.1])
    boxes = [torch.stack([near, far, far, far]), torch.stack([near]), torch.zeros(0, 4)]
    got = coverage_accuracy(points, boxes, per_sample=True)
    assert float(got["CoverAcc"]) == pytest.approx(100 * (0.25 + 1) / 2, abs=1e-10)
    assert (got["covered"].tolist(), got["boxes"].tolist()) == ([1, 1, 0], [4, 1, 0])
    with pytest.warns(UserWarning, match="CoverAcc would divide by zero and are NaN, because no picture with a target box"):
        assert coverage_accuracy(points[:1], boxes[2:])["CoverAcc"].isnan()


def test_no_point_covers_nothing():
    assert float(coverage_accuracy(torch.zeros(1, 0, 2), [torch.tensor([[0.5, 0.5, 1.0, 1.0]])])["CoverAcc"]) == 0


BOX = [torch.tensor([[0.5, 0.5, 0.2, 0.2]])]


@pytest.mark.parametrize(
    ("points", "boxes", "error", "message"),
    [
        (torch.zeros(1, 3, 3), BOX, ValueError, r"`points` must be \(B, K, 2\), got \(1, 3, 3\)\."),
        (torch.zeros(2, 3, 2), BOX, ValueError, r"`boxes` must be as many tensors as pictures in `points`, 2, got 1\."),
        (torch.full((1, 3, 2), 100.0), BOX, ValueError, r"`points` must be in \[0, 1\], got 6 of 6 that are not\."),
        (torch.full((1, 3, 2), torch.nan), BOX, ValueError, r"`points` must be in \[0, 1\], got 6 of 6 that are not\."),
        (torch.zeros(1, 3, 2), [BOX[0] * 480], ValueError, r"`boxes` must be in \[0, 1\], got 4 of 4 that are not\."),
        (torch.zeros(1, 3, 2), [BOX[0][0]], ValueError, r"`boxes\[0\]` must be \(M, 4\), got \(4,\)\."),
        (torch.zeros(1, 3, 2, dtype=torch.long), BOX, TypeError, r"`points` must be a floating-point tensor, got torch\.int64\."),
    ],
)
def test_bad_input(points, boxes, error, message):
    with pytest.raises(error, match=message):
        coverage_accuracy(points, boxes)
    with pytest.raises(error, match="CoverageAccuracy.update: " + message):
        CoverageAccuracy().update(points, boxes)
