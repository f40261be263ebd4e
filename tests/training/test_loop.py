from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gresbox.data import SyntheticGRES
from gresbox.models import load_model
from gresbox.training import EvaluationOptions, TrainOptions, read_log, train

PROGRAM = str(Path(__file__).parent / "tiny_run.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out / "log.jsonl") if entry["kind"] == "train"]


def assert_same_run(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    assert losses(first) == losses(second)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, tiny, workers):
    options = {"max_steps": 10, "batch": 4, "log_every": 1, "checkpoint_every": 3, "random": True, "workers": workers}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, PROGRAM, json.dumps([{"out": str(killed), "delay": 0.1, **options}])], env=ENVIRONMENT
    )
    try:
        deadline = time.monotonic() + 300  # a busy machine takes a minute to import the libraries
        while len(losses(killed)) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(losses(killed)) < 10
    assert not (killed / "metrics.json").exists()
    tiny.tiny_training(whole, **options)
    tiny.tiny_training(killed, resume=True, **options)
    assert_same_run(whole, killed)
    steps = [entry["step"] for entry in read_log(killed / "log.jsonl") if entry["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_two_processes_and_accumulation_train_as_one_with_the_whole_batch(tmp_path, tiny):
    options = {"max_steps": 4, "batch": 8, "log_every": 1, "lr": 2e-4}
    runs = [{"out": str(tmp_path / f"two_{accumulate}"), "accumulate": accumulate, **options} for accumulate in (1, 2)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", PROGRAM, json.dumps(runs)]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    tiny.tiny_training(tmp_path / "one", **options)
    tiny.tiny_training(tmp_path / "one_4", accumulate=4, **options)
    assert process.wait(timeout=120) == 0
    wanted = losses(tmp_path / "one")
    assert len(wanted) == 4
    for name in ("one_4", "two_1", "two_2"):
        assert losses(tmp_path / name) == pytest.approx(wanted, rel=1e-6, abs=1e-5), name
        scores, reference = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in (name, "one"))
        assert scores["samples"] == reference["samples"] == 5  # an odd number: no sample is counted twice
        for key in ("gIoU", "cIoU", "N_acc", "T_acc", "no_target_share"):
            assert scores[key] == pytest.approx(reference[key], abs=0.05), (name, key)


def test_the_folder_holds_a_model_that_scores_the_same(tmp_path, tiny):
    from gresbox.training import evaluate

    scores = tiny.tiny_training(tmp_path / "run", max_steps=2, batch=4, evaluate_start=True, evaluate_every=1, tensorboard=True)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written == {**scores, "seed": 0, "batch": 4, "train_samples": 24}
    again = evaluate(load_model(str(tmp_path / "run")), SyntheticGRES("val", 5, image_size=64), EvaluationOptions(batch=3))
    assert all(again[name] == pytest.approx(scores[name], abs=1e-4) for name in again)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [(entry["kind"], entry["step"]) for entry in log] == [
        ("evaluation", 0),
        ("evaluation", 1),
        ("train", 2),
        ("evaluation", 2),
    ]
    assert {"loss", "grad_norm", "lr", "epoch", "seconds", "loss/mask_dice"} <= log[2].keys()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_finished_run_is_not_overwritten_but_can_be_asked_to_resume(tmp_path, tiny):
    options = {"max_steps": 2, "batch": 4, "checkpoint_every": 1}
    first = tiny.tiny_training(tmp_path, **options)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match=r"`out` must be a new folder, got .* with a finished run"):
        tiny.tiny_training(tmp_path, **options)
    again = tiny.tiny_training(tmp_path, resume=True, **options)
    assert again == pytest.approx(first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    with pytest.raises(ValueError, match=r"`seed` must be 0 to continue the run in .*, got 1\."):
        tiny.tiny_training(tmp_path, resume=True, seed=1, **options)
    with pytest.raises(ValueError, match=r"`recipe.lr` must be .* to continue the run in .*, got 0\.5\."):
        tiny.tiny_training(tmp_path, resume=True, lr=0.5, **options)


def test_resume_without_a_checkpoint_starts(tmp_path, tiny):
    assert tiny.tiny_training(tmp_path / "new", resume=True, max_steps=1, batch=2)["steps"] == 1


def test_the_clock_stops_the_training(tmp_path, tiny):
    scores = tiny.tiny_training(tmp_path, max_steps=1000, batch=2, max_seconds=0.5)
    assert 1 <= scores["steps"] < 1000
    assert (tmp_path / "metrics.json").exists()
    assert len(losses(tmp_path)) >= 1


def test_bf16_trains_and_the_model_keeps_its_own_forward(tmp_path, tiny):
    model = tiny.tiny_model()
    options = TrainOptions(max_steps=2, batch=4, amp="bf16", cpu=True, progress=False)
    train(model, SyntheticGRES("train", 8, image_size=64), None, tmp_path, options)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    batch = model.processor([torch.zeros(3, 64, 64, dtype=torch.uint8)], ["the red circle"])
    assert model(**batch).no_target.dtype == torch.float32
    assert not hasattr(model.forward, "__wrapped__")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, tiny):
    model = tiny.tiny_model()
    with torch.no_grad():
        model.no_target_head.requires_grad_(True)
        next(model.no_target_head.parameters()).fill_(float("nan"))
    options = TrainOptions(max_steps=3, batch=2, log_every=1, checkpoint_every=1, cpu=True, progress=False)
    with pytest.raises(RuntimeError, match="the loss must stay finite, got nan between steps 0 and 1"):
        train(model, SyntheticGRES("train", 8, image_size=64), None, tmp_path, options)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_a_criterion_of_ones_own_needs_no_instances(tmp_path, tiny):
    class Merged(torch.nn.Module):
        def forward(self, output, targets):
            loss = sum(part.float().square().mean() for part in (output.merged, output.no_target))
            return {"loss": loss + 0 * sum(step.score_logits.sum() for step in (*output.aux, output.instances))}

    options = TrainOptions(max_steps=2, batch=2, log_every=1, cpu=True, progress=False)
    train(tiny.tiny_model(), SyntheticGRES("train", 8, image_size=64), None, tmp_path, options, criterion=Merged())
    assert len(losses(tmp_path)) == 2
