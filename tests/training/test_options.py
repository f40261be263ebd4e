from __future__ import annotations

import json

import pytest

from gresbox.structures import Recipe
from gresbox.training import EvaluationOptions, TrainOptions, read_log
from gresbox.training.records import RunLog


def test_the_recipe_decides_where_nothing_is_given():
    recipe = Recipe(lr=3.0, batch=8, epochs=2, amp="bf16")
    assert TrainOptions().applied_to(recipe) == recipe
    changed = TrainOptions(lr=1.0, epochs=0.5, amp="no").applied_to(recipe)
    assert (changed.lr, changed.batch, changed.epochs, changed.amp) == (1.0, 8, 0.5, "no")


def test_steps_are_counted_from_epochs():
    recipe = Recipe(batch=8, epochs=2)
    assert TrainOptions().total_steps(recipe, 100) == 25
    assert TrainOptions().total_steps(recipe, 101) == 26
    assert TrainOptions().total_steps(recipe, 1) == 1
    assert TrainOptions(max_steps=7).total_steps(recipe, 100) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "`accumulate` must be at least 1, got 0."),
        ({"workers": -1}, "`workers` must be at least 0, got -1."),
        ({"lr": float("nan")}, "`lr` must be at least 0, got nan."),
        ({"amp": "fp8"}, "`amp` must be one of None, 'no', 'bf16', 'fp16', got 'fp8'."),
        ({"schedule": "lineal"}, "`schedule` must be one of None, 'linear'"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match="TrainOptions: ") as caught:
        TrainOptions(**options)
    assert message in str(caught.value)


def test_evaluation_options_are_checked():
    with pytest.raises(ValueError, match=r"`no_target_threshold` must be in \[0, 1\], got 2"):
        EvaluationOptions(no_target_threshold=2)
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        EvaluationOptions(limit=0)


def test_a_log_drops_what_a_killed_run_did_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, start=0, total=3, progress=False)
    for step in (1, 2, 3):
        log.write(step, {"loss": float("inf") if step == 1 else 1.0 / step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    RunLog(tmp_path, start=2, total=3, progress=False).write(3, {"loss": 0.25})
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(1, None), (2, 0.5), (3, 0.25)]


def test_only_the_first_process_writes(tmp_path):
    RunLog(tmp_path, start=0, total=1, active=False).write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
