from __future__ import annotations

import pytest
import torch

from gresbox.structures import Recipe
from gresbox.training.schedule import SCHEDULES, learning_rate_factor, set_learning_rates


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(schedule="linear", lr=1e-4, final_lr=1e-6), {0: 1.0, 25: 0.7525, 100: 0.01, 200: 0.01}),
        (Recipe(schedule="poly", lr=1.0, final_lr=0.0, power=0.9), {0: 1.0, 50: 0.5**0.9, 100: 0.0}),
        (Recipe(schedule="cosine", lr=1.0, final_lr=0.2), {0: 1.0, 50: 0.6, 100: 0.2}),
        (Recipe(schedule="step", milestones=(0.5, 0.75), gamma=0.1), {0: 1.0, 49: 1.0, 50: 0.1, 75: 0.01, 99: 0.01}),
        (Recipe(schedule="constant"), {0: 1.0, 99: 1.0}),
        (Recipe(schedule="constant", warmup=4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0}),
    ],
)
def test_factors(recipe, expected):
    for step, factor in expected.items():
        assert learning_rate_factor(recipe, step, 100) == pytest.approx(factor, abs=1e-12)


def test_linear_is_torchs_linear():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=7)
    for step in range(7):
        factor = learning_rate_factor(Recipe(lr=1e-4, final_lr=1e-6), step, 7)
        assert 1e-4 * factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_groups_keep_their_proportions():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.1}])
    for factor in (1.0, 0.5, 0.25):
        set_learning_rates(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, 0.1 * factor])


def test_an_unknown_schedule_is_refused():
    assert "linear" in SCHEDULES
    with pytest.raises(ValueError, match=r"`recipe.schedule` must be one of 'linear'"):
        learning_rate_factor(Recipe(schedule="lineal"), 0, 10)
