"""ThresholdSweep: every point of its curves is GRESMetric at that threshold; AUROC, AP and the chosen threshold by counting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_f1_score

from gresbox.metrics import ThresholdSweep, gres_metrics, sweep_thresholds


@st.composite
def expressions(draw, both=False):
    """Small masks with scores on a coarse grid, so that scores tie and meet thresholds."""
    count = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    none = torch.tensor([draw(st.booleans()) for _ in range(count)])
    if both:
        none[:2] = torch.tensor([True, False])
    target = (torch.rand(count, 3, 4, generator=generator) < 0.6) & ~none[:, None, None]
    target[~none, 0, 0] = True
    pred = torch.rand(count, 3, 4, generator=generator) < 0.6
    scores = torch.tensor([draw(st.integers(0, 10)) for _ in range(count)], dtype=torch.float64) / 10
    return pred, target, scores, none


@given(expressions(both=True))
def test_the_curves_are_the_benchmark_metric_at_each_threshold(data):
    pred, target, scores, none = data
    result = sweep_thresholds(pred, target, scores, none)
    assert result["threshold"].tolist() == [step / 100 for step in range(101)]
    for place in range(0, 101, 5):
        threshold = result["threshold"][place]
        want = gres_metrics(pred, target, scores > threshold, none)
        for name in ("gIoU", "cIoU", "N_acc", "T_acc"):
            assert float(result[name][place]) == pytest.approx(float(want[name]), abs=1e-10), (name, float(threshold))
        f1 = 100 * float(binary_f1_score((scores > threshold).long(), none.long()))
        assert float(result["F1"][place]) == pytest.approx(f1, abs=1e-4)


@given(expressions(both=True))
def test_the_ranking_numbers(data):
    pred, target, scores, none = data
    result = sweep_thresholds(pred, target, scores, none)
    above = [(float(a) > float(b)) + 0.5 * (a == b) for a in scores[none] for b in scores[~none]]
    assert float(result["AUROC"]) == pytest.approx(100 * float(sum(above)) / len(above), abs=1e-10)
    assert float(result["AUROC"]) == pytest.approx(100 * float(binary_auroc(scores, none.long())), abs=1e-4)
    assert float(result["AP"]) == pytest.approx(100 * float(binary_average_precision(scores, none.long())), abs=1e-4)
    assert float(result["no_target_share"]) == pytest.approx(100 * float(none.double().mean()), abs=1e-10)


@given(expressions(both=True), st.sampled_from([0, 10, 50, 66.6, 90, 100]))
def test_the_threshold_for_a_wished_t_acc(data, wished):
    pred, target, scores, none = data
    sweep = ThresholdSweep()
    sweep.update(pred, target, scores, none)
    point = sweep.threshold_for(t_acc=wished)
    got = gres_metrics(pred, target, scores > point["threshold"], none)
    assert float(got["T_acc"]) >= wished
    for name in ("gIoU", "cIoU", "N_acc", "T_acc"):
        assert float(point[name]) == pytest.approx(float(got[name]), abs=1e-10)
    lower = [step for step in [0.0, *scores.tolist()] if step < float(point["threshold"])]
    assert all(float(gres_metrics(pred, target, scores > step, none)["T_acc"]) < wished for step in lower)


def test_without_no_target_expressions_t_acc_still_counts():
    full = torch.ones(2, 2, 2, dtype=torch.bool)
    sweep = ThresholdSweep([0.5])
    sweep.update(full, full, torch.tensor([0.2, 0.9]))
    with pytest.warns(UserWarning, match="AUROC, AP would divide by zero and are NaN, because every expression has a target"):
        result = sweep.compute()
    assert (float(result["T_acc"]), float(result["no_target_share"])) == (50, 0)
    assert result["N_acc"].isnan()
    assert float(sweep.threshold_for(t_acc=100)["threshold"]) == pytest.approx(0.9)
    assert "2 expressions, 0.0 % without a target" in sweep.summary()


def test_the_share_without_a_target_stands_beside_every_table_and_picture():
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    masks[0] = True
    sweep = ThresholdSweep()
    sweep.update(masks, masks, torch.tensor([0.1, 0.4, 0.9]))
    share = "3 expressions, 66.7 % without a target"
    lines = sweep.summary([0.25, 0.5]).splitlines()
    assert lines[0].startswith(share)
    assert lines[1].split() == ["threshold", "gIoU", "cIoU", "N_acc", "T_acc", "F1"]
    assert [float(line.split()[0]) for line in lines[2:]] == [0.25, 0.5]
    _, axes = sweep.plot()
    assert share in axes[0].get_title()
    assert float(sweep.compute()["no_target_share"]) == pytest.approx(200 / 3)


def test_scores_of_float32_are_compared_in_float64():
    masks = torch.zeros(1, 1, 1, dtype=torch.bool)
    with pytest.warns(UserWarning, match="no expression has a target"):
        at_eight, at_seven = (
            sweep_thresholds(masks, masks, torch.tensor([score]), thresholds=[score])["N_acc"] for score in (0.8, 0.7)
        )
    assert (float(at_eight), float(at_seven)) == (100, 0)  # a float32 0.8 lies above 0.8, a float32 0.7 below 0.7


MASKS = torch.zeros(2, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        (torch.tensor([0.5, math.nan]), {}, ValueError, r"`no_target_scores` must be in \[0, 1\], got 1 of 2 that are not\."),
        (torch.tensor([0.5, 3.0]), {}, ValueError, r"`no_target_scores` must be in \[0, 1\], got 1 of 2 that are not\."),
        (torch.tensor([0.5]), {}, ValueError, r"`no_target_scores` must be \(B,\) with B=2, got \(1,\)\."),
        (torch.ones(2, 1), {}, ValueError, r"`no_target_scores` must be \(B\), got \(2, 1\)\."),
        (torch.tensor([True, False]), {}, TypeError, r"`no_target_scores` must be a floating-point tensor, got torch\.bool\."),
        (torch.ones(2), {"thresholds": [0.5, 1.5]}, ValueError, r"`thresholds` must be in \[0, 1\], got 1 of 2 that are not\."),
        (torch.ones(2), {"thresholds": 0.5}, ValueError, r"`thresholds` must be \(T\), got \(\)\."),
    ],
)
def test_bad_input(scores, options, error, message):
    with pytest.raises(error, match=message):
        sweep_thresholds(MASKS, MASKS, scores, **options)


def test_a_threshold_that_cannot_be_chosen():
    sweep = ThresholdSweep()
    sweep.update(MASKS, MASKS, torch.ones(2))
    with pytest.raises(ValueError, match=r"threshold_for: `update` must have added an expression with a target, got none\."):
        sweep.threshold_for(t_acc=50)
    with pytest.raises(ValueError, match=r"threshold_for: `t_acc` must be in \[0, 100\], got 101\."):
        sweep.threshold_for(t_acc=101)
