"""A recipe's optimiser."""

from __future__ import annotations

from typing import Any

from torch.optim import Adam, AdamW, Optimizer

from gresbox._checks import check_choice
from gresbox.structures import Recipe

__all__ = ["make_optimizer"]

_CLASSES: dict[str, Any] = {"adamw": AdamW, "adam": Adam}


def make_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> Optimizer:
    """Build what ``recipe.optimizer`` names, with the recipe's numbers.

    Args:
        recipe: Name, peak learning rate, betas, eps and amsgrad; weight decay comes with the groups.
        groups: What a model's ``parameter_groups`` returns.

    Raises:
        ValueError: If the recipe names an unknown optimiser.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> type(make_optimizer(Recipe(optimizer="adam"), [{"params": [weight]}])).__name__
        'Adam'
    """
    check_choice("make_optimizer", "recipe.optimizer", recipe.optimizer, tuple(_CLASSES))
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"}  # one pass over all parameters instead of a dozen small operations for each
    numbers = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "amsgrad": recipe.amsgrad}
    return _CLASSES[recipe.optimizer](groups, **numbers, fused=fused)
