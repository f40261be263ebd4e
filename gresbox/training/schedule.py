"""Learning-rate schedules: one function of the step, so that there is no scheduler state to save or to lose."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from gresbox._checks import check_choice
from gresbox.structures import Recipe

__all__ = ["SCHEDULES", "learning_rate_factor", "set_learning_rates"]

SCHEDULES = ("linear", "step", "poly", "cosine", "constant")


def learning_rate_factor(recipe: Recipe, step: int, total_steps: int) -> float:
    r"""The factor on every group's peak learning rate at an optimiser step.

    With progress :math:`u = step / total` and :math:`f = final\_lr / lr`: linear :math:`1 - u (1 - f)`; poly
    :math:`f + (1 - f)(1 - u)^{power}`; cosine :math:`f + (1 - f)(1 + \cos \pi u) / 2`; step :math:`\gamma^k` after ``k``
    milestones; constant 1. The first ``warmup`` steps are multiplied by :math:`(step + 1) / warmup`.

    Paper: linear from 1e-4 to 1e-6 per step (arXiv:2411.15087, Sec. 4.1).

    Args:
        recipe: The schedule's name and numbers.
        step: The optimiser step, from 0.
        total_steps: Optimiser steps of the whole training.

    Raises:
        ValueError: If the recipe names an unknown schedule.

    Example:
        >>> recipe = Recipe(schedule="linear", lr=1e-4, final_lr=1e-6)
        >>> [round(learning_rate_factor(recipe, step, 100), 4) for step in (0, 50, 100)]
        [1.0, 0.505, 0.01]
    """
    check_choice("learning_rate_factor", "recipe.schedule", recipe.schedule, SCHEDULES)
    progress = min(step / max(total_steps, 1), 1.0)
    floor = recipe.final_lr / recipe.lr if recipe.lr > 0 else 1.0
    warm = min((step + 1) / recipe.warmup, 1.0) if recipe.warmup > 0 else 1.0
    if recipe.schedule == "linear":
        shape = 1 - progress * (1 - floor)
    elif recipe.schedule == "poly":
        shape = floor + (1 - floor) * (1 - progress) ** recipe.power
    elif recipe.schedule == "cosine":
        shape = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    elif recipe.schedule == "step":
        shape = recipe.gamma ** sum(progress >= milestone for milestone in recipe.milestones)
    else:
        shape = 1.0
    return warm * shape


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each parameter group's rate to ``factor`` times its ``peak_lr``, so that all groups keep their proportions.

    Args:
        optimizer: Its groups carry ``peak_lr``; a group without it takes its present rate as the peak.
        factor: From :func:`learning_rate_factor`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.5}])
        >>> set_learning_rates(optimizer, 0.1)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
