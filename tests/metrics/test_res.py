"""RESMetric: means and sums over expressions, and what an empty union does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.metrics import RESMetric, res_metrics


def strip(*lengths, width=10):
    """Masks of one row, True on the first pixels."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None])[:, None]


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=8))
def test_against_the_definition(lengths):
    pred, target = (strip(*column) for column in zip(*lengths, strict=True))
    ious = [min(one, other) / max(one, other) if one or other else 0.0 for one, other in lengths]
    union = sum(max(pair) for pair in lengths)
    got = res_metrics(pred, target, per_sample=True) if union else None
    if got is None:
        return
    assert got["iou"].tolist() == pytest.approx(ious, abs=1e-15)
    assert float(got["mIoU"]) == pytest.approx(100 * sum(ious) / len(ious), abs=1e-10)
    assert float(got["oIoU"]) == pytest.approx(100 * sum(min(pair) for pair in lengths) / union, abs=1e-10)
    for tenths in range(5, 10):  # in whole pixels, without rounding
        hits = sum(10 * min(pair) >= tenths * max(pair) > 0 for pair in lengths)
        assert float(got[f"Pr@0.{tenths}"]) == pytest.approx(100 * hits / len(ious), abs=1e-10)


def test_an_empty_union_is_0_or_nan():
    pred = target = strip(4, 0)
    assert float(res_metrics(pred, target)["mIoU"]) == 50
    with pytest.warns(UserWarning, match="mIoU would divide by zero and are NaN, because no pixel .* in some expression"):
        got = res_metrics(pred, target, empty_union="nan")
    assert got["mIoU"].isnan()
    assert (float(got["oIoU"]), float(got["Pr@0.9"])) == (100, 50)
    with pytest.warns(UserWarning, match="oIoU would divide by zero and are NaN, because no pixel is predicted or true"):
        assert float(res_metrics(pred[1:], target[1:])["mIoU"]) == 0


def test_sums_stay_exact_beyond_float32():
    wide = torch.ones(1, 1, 2**24 + 1, dtype=torch.bool)
    got = res_metrics(wide, wide, per_sample=True)
    assert int(got["union"]) == 2**24 + 1


def test_bad_input():
    with pytest.raises(ValueError, match="`empty_union` must be one of 'zero', 'nan', got 'one'"):
        RESMetric(empty_union="one")
    with pytest.raises(ValueError, match=r"RESMetric.update: `target` must be \(B, H, W\) with W=10, got \(1, 1, 9\)\."):
        RESMetric().update(strip(3), strip(3, width=9))
    with pytest.raises(TypeError, match=r"`pred\[0\]` must be a tensor, got list\."):
        res_metrics([[[True]]], [torch.ones(1, 1, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"`sample_ids` must be \(B,\) with B=2, got \(1,\)\."):
        RESMetric().update(strip(3, 4), strip(3, 4), sample_ids=[5])
    with pytest.raises(TypeError, match=r"`sample_ids` must be integers, got str\."):
        RESMetric().update(strip(3), strip(3), sample_ids=["5"])
    with pytest.raises(TypeError, match=r"`sample_ids` must be integers, got torch\.float32\."):
        RESMetric().update(strip(3), strip(3), sample_ids=torch.ones(1))
