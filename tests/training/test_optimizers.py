import pytest
import torch

from gresbox.structures import Recipe
from gresbox.training.optimizers import make_optimizer


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.5}]


@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_recipe_names_the_optimizer_and_its_numbers(name, cls):
    numbers = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": True}
    optimizer = make_optimizer(Recipe(optimizer=name, **numbers), groups())
    assert type(optimizer) is cls
    assert all(optimizer.param_groups[0][key] == value for key, value in {**numbers, "weight_decay": 0.5}.items())


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"make_optimizer: `recipe.optimizer` must be .*, got 'lion'\."):
        make_optimizer(Recipe(optimizer="lion"), groups())
