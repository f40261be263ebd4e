"""The rules that decide "nothing"."""

from __future__ import annotations

import pytest
import torch

from gresbox.metrics import no_target_from_logits, no_target_from_scores


def test_a_score_at_the_threshold_is_not_above_it():
    scores = torch.tensor([[0.7, 0.1], [0.71, 0.1], [0.0, 0.0]])
    assert no_target_from_scores(scores).tolist() == [True, False, True]
    # in the scores' own dtype: a float32 0.8 lies above the float64 0.8, but not above the float32 one
    assert no_target_from_scores(torch.tensor([[0.8]]), threshold=0.8).tolist() == [True]
    assert no_target_from_scores(scores.double(), threshold=0.05).tolist() == [False, False, True]


def test_lists_of_different_lengths_and_no_scores_at_all():
    assert no_target_from_scores([torch.tensor([0.9, 0.1]), torch.zeros(0), torch.tensor([0.2])]).tolist() == [False, True, True]
    assert no_target_from_scores([]).shape == (0,)
    assert no_target_from_scores(torch.zeros(3, 0)).tolist() == [True, True, True]


def test_logits_that_tie():
    logits = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [40.0, 60.0]])
    assert no_target_from_logits(logits).tolist() == [False, True, False, False]
    assert no_target_from_logits(logits, sigmoid=False).tolist() == [False, True, False, True]
    assert no_target_from_logits(logits.double() / 4).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: no_target_from_scores(torch.tensor([[0.1, float("nan")]])), ValueError, "`scores` must be numbers, got 1 of 2"),
        (lambda: no_target_from_scores(torch.ones(2, 3, dtype=torch.long)), TypeError, "`scores` must be a floating-point tensor"),
        (lambda: no_target_from_scores(torch.ones(2)), ValueError, r"`scores` must be \(B, N\), got \(2,\)\."),
        (lambda: no_target_from_scores([torch.ones(2, 1)]), ValueError, r"`scores\[0\]` must be \(N\), got \(2, 1\)\."),
        (lambda: no_target_from_scores(torch.ones(1, 2), threshold=float("nan")), ValueError, "`threshold` must be"),
        (lambda: no_target_from_logits(torch.ones(2, 3)), ValueError, r"`logits` must be \(B, 2\), got \(2, 3\)\."),
        (lambda: no_target_from_logits(torch.ones(2, 2, dtype=torch.bool)), TypeError, "`logits` must be a floating-point tensor"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
