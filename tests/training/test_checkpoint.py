from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from gresbox.training.checkpoint import Checkpoints, TrainState
from gresbox.training.randomness import get_random_state, seed_random, set_random_state


def state(step: int) -> TrainState:
    return TrainState(step, 1.5, {"state": {}, "param_groups": []}, [get_random_state()], {"seed": 0})


def test_the_newest_are_kept_and_come_back_the_same(tmp_path, tiny):
    model = tiny.tiny_model()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.steps() == []
    for step in (1, 2, 10):
        checkpoints.save(model, state(step))
    assert checkpoints.steps() == [2, 10]
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    loaded = checkpoints.load(model, 10)
    assert (loaded.step, loaded.seconds, loaded.run) == (10, 1.5, {"seed": 0})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_is_a_model(tmp_path, tiny):
    from gresbox.models import load_model

    model = tiny.tiny_model()
    path = Checkpoints(tmp_path).save(model, state(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(str(path)).parameters(), strict=True))


def test_leftovers_of_a_killed_write_are_not_checkpoints(tmp_path, tiny):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / "step-00000008").mkdir()  # without its state
    (tmp_path / "step-last").mkdir()
    assert checkpoints.steps() == []
    checkpoints.save(tiny.tiny_model(), state(9))
    assert checkpoints.steps() == [9]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_corrupt_checkpoint_is_named_in_one_line(tmp_path, tiny, name):
    model = tiny.tiny_model()
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(model, state(4))
    (path / name).write_bytes((path / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000004. cannot be read") as caught:
        checkpoints.load(model, 4)
    assert "\n" not in str(caught.value)


def test_opening_a_checkpoint_runs_no_code(tmp_path, tiny):
    model = tiny.tiny_model()
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(model, state(4))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"step": Evil()}, path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.load(model, 4)
    assert not (tmp_path / "evil").exists()


def test_random_state_survives_a_file(tmp_path):
    seed_random(5)
    np.random.standard_normal()  # noqa: NPY002 - leaves a cached second value behind
    torch.save(get_random_state(), tmp_path / "random.pt")
    wanted = (random.random(), np.random.standard_normal(2).tolist(), torch.rand(2).tolist())  # noqa: NPY002
    set_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert (random.random(), np.random.standard_normal(2).tolist(), torch.rand(2).tolist()) == wanted  # noqa: NPY002
