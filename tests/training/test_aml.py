from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gresbox.blocks import AlignmentAwareMasking, RandomBlockMasking
from gresbox.data import SyntheticGRES
from gresbox.models import load_model
from gresbox.structures import GresTarget
from gresbox.training import AlignmentMaskedTraining, TrainOptions, read_log, train

PROGRAM = Path(__file__).parent / "masked_run.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}

spec = importlib.util.spec_from_file_location("masked_run", PROGRAM)
assert spec is not None
assert spec.loader is not None
run = importlib.util.module_from_spec(spec)
sys.modules["masked_run"] = run  # torch.compile imports by name what it reads
spec.loader.exec_module(run)


def loss_of(model, inputs, truth):
    return F.binary_cross_entropy_with_logits(model(**inputs), truth)


def seeded(training, seed=3):
    training.generator = torch.Generator().manual_seed(seed)
    return training


def masked_by(training, inputs):
    return {**inputs, "images": seeded(training).mask_images(**inputs)[0]}


@given(seed=st.integers(0, 10**6), drop=st.sampled_from([0.25, 1.0]))
def test_a_step_is_the_plain_step_on_the_masked_picture(seed, drop):
    inputs, truth = run.batch(seed=seed)
    training = AlignmentMaskedTraining(run.ours(), run.masking(drop=drop))
    plain = copy.deepcopy(training.model)
    loss_of(plain, masked_by(training, inputs), truth).backward()
    loss_of(seeded(training), inputs, truth).backward()
    wanted = run.gradients(plain)
    assert all(torch.equal(grad, wanted[name]) for name, grad in run.gradients(training.model).items())


@pytest.mark.parametrize("options", [{"threshold": 0.0, "drop": 1.0}, {"threshold": 1.0, "drop": 0.0}])
def test_where_nothing_is_hidden_it_is_plain_training(options):
    inputs, _ = run.batch()
    training = AlignmentMaskedTraining(run.ours(), run.masking(**options))
    assert torch.equal(training(**inputs), training.model(**inputs))
    assert training.shares["masked"] == 0


def test_evaluation_is_the_plain_model_bit_for_bit(tiny):
    model = tiny.tiny_model(0.1)
    inputs = model.processor([torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)], ["the red circle"])
    training = AlignmentMaskedTraining(model).eval()
    state = torch.get_rng_state()
    got, want = training(**inputs), model(**inputs)
    assert torch.equal(got.merged, want.merged)
    assert torch.equal(got.no_target, want.no_target)
    assert torch.equal(torch.get_rng_state(), state)
    assert not training.shares
    assert all(not module.training for module in model.modules())


class Watching(run.Ours):
    """Notes how stage 1 calls it, and can be told to fail."""

    seen: dict
    fail = ""

    def encode(self, images, input_ids, attention_mask):
        encoded = super().encode(images, input_ids, attention_mask)
        if "calls" in self.seen:
            self.seen["calls"].append((torch.is_grad_enabled(), self.training, self.dropout.training, encoded[0].requires_grad))
        if self.fail == "encode" and len(self.seen["calls"]) == 1:
            raise RuntimeError("stopped")
        return encoded


def test_stage_1_has_no_gradient_and_runs_in_evaluation_mode():
    model = Watching(dropout=0.5)
    model.seen = {"calls": []}
    inputs, truth = run.batch()
    training = AlignmentMaskedTraining(model, run.masking())
    loss_of(training, inputs, truth).backward()
    assert model.seen["calls"] == [(False, False, False, False), (True, True, True, True)]
    model.seen["calls"].clear()
    AlignmentMaskedTraining(model, run.masking(), score_mode="train")(**inputs)
    assert model.seen["calls"][0] == (False, True, True, False)


@pytest.mark.parametrize("fails", ["", "encode", "masking", "model"])
def test_every_module_gets_its_own_flag_back(fails):
    model = Watching(nn.BatchNorm2d)
    model.seen, model.fail = {"calls": []}, fails
    model.image_encoder[1].eval()  # a frozen norm in a training model
    training = AlignmentMaskedTraining(model, run.masking())
    if fails == "masking":
        training.masking.forward = lambda *_, **__: 1 / 0
    if fails == "model":
        model.head.forward = lambda *_: 1 / 0
    before = {name: module.training for name, module in training.named_modules()}
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    inputs, _ = run.batch()
    if fails:
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            training(**inputs)
    else:
        training(**inputs)
    assert {name: module.training for name, module in training.named_modules()} == before
    assert before["model.image_encoder.1"] is False
    assert all(torch.equal(value, state[name]) for name, value in training.model.state_dict().items())


def test_buffers_see_the_masked_picture_only_unless_asked():
    inputs, _ = run.batch()
    training = AlignmentMaskedTraining(run.ours(nn.BatchNorm2d), run.masking(drop=1.0))
    plain = copy.deepcopy(training.model)
    plain(**masked_by(training, inputs))
    training(**inputs)
    assert training.model.image_encoder[1].num_batches_tracked == 1
    assert torch.equal(training.model.image_encoder[1].running_mean, plain.image_encoder[1].running_mean)
    AlignmentMaskedTraining(training.model, run.masking(), score_mode="train")(**inputs)
    assert training.model.image_encoder[1].num_batches_tracked == 3


def test_random_numbers_are_the_plain_models_with_a_generator_and_come_from_the_global_one_without():
    inputs, _ = run.batch()
    training = seeded(AlignmentMaskedTraining(run.ours(dropout=0.5), run.masking()))
    torch.manual_seed(1)
    training(**inputs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    training.model(**inputs)
    assert torch.equal(torch.get_rng_state(), after)
    training.generator = None
    hidden = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        hidden.append(training.mask_images(**inputs)[1])
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


def test_padding_does_not_change_what_is_hidden():
    inputs, _ = run.batch()
    training = AlignmentMaskedTraining(run.ours(), run.masking(drop=1.0))
    _, removed, similarity = training.mask_images(**inputs)
    longer = {
        "images": inputs["images"],
        "input_ids": F.pad(torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7), (0, 3), value=11),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 3)),
    }
    _, again, same = training.mask_images(**longer)
    torch.testing.assert_close(same, similarity)
    assert torch.equal(again, removed)
    nothing = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    assert not training.mask_images(**nothing)[1].any()


def test_a_copy_is_of_its_own_and_names_its_settings():
    training = AlignmentMaskedTraining(run.ours(), run.masking(), clean_loss_weight=0.25)
    twin = copy.deepcopy(training)
    with torch.no_grad():
        twin.model.text_encoder.weight.zero_()
    inputs, _ = run.batch()
    assert (twin.mask_images(**inputs)[2] != training.mask_images(**inputs)[2]).any()
    assert "threshold=0.5" in training.settings()["masking"]
    assert json.loads(json.dumps(training.settings()))["clean_loss_weight"] == 0.25


def test_random_blocks_read_no_features():
    training = AlignmentMaskedTraining(
        run.ours(), RandomBlockMasking(block=4, drop=0.25, mode="exact"), encode=lambda *_, **__: 1 / 0
    )
    inputs, _ = run.batch()
    training(**inputs)
    assert training.shares["masked"] == 0.25


def test_the_clean_pictures_loss_has_its_weight():
    inputs, truth = run.batch()
    training = AlignmentMaskedTraining(run.ours(), run.masking(drop=1.0), clean_loss_weight=0.25)
    plain = copy.deepcopy(training.model)
    (0.25 * loss_of(plain, inputs, truth) + 0.75 * loss_of(plain, masked_by(training, inputs), truth)).backward()
    run.step(training, training, inputs, truth)
    for name, grad in run.gradients(training.model).items():
        torch.testing.assert_close(grad, dict(plain.named_parameters())[name].grad, msg=name)


def test_autocast_gives_every_parameter_its_gradient():
    def seen():
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    inputs, truth = run.batch()
    training = AlignmentMaskedTraining(run.ours(), run.masking(drop=1.0))
    plain = copy.deepcopy(training.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masked = masked_by(training, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(plain, masked, truth)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(training, inputs, truth)
    loss.backward()
    wanted = run.gradients(plain)
    assert all(torch.equal(grad, wanted[name]) for name, grad in run.gradients(training.model).items())
    assert all(grad.any() for grad in wanted.values())
    caches = []
    training = AlignmentMaskedTraining(plain, run.masking(), encode=lambda *a, **k: caches.append(seen()) or plain.encode(*a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        training(**inputs)
        caches.append(seen())
    assert caches == [(True, torch.bfloat16, False), (True, torch.bfloat16, True)]


@pytest.mark.parametrize("outer", [False, True])
def test_a_compiled_model_trains_the_same(outer):
    inputs, truth = run.batch()
    eager = seeded(AlignmentMaskedTraining(run.ours(), run.masking()))
    torch._dynamo.reset()
    model = run.ours()
    training = seeded(AlignmentMaskedTraining(model if outer else torch.compile(model, backend="aot_eager"), run.masking()))
    called = torch.compile(training, backend="aot_eager") if outer else training
    for _ in range(2):
        for wrapper in (eager, called):
            loss_of(wrapper, inputs, truth).backward()
    wanted = run.gradients(eager.model)
    for name, grad in run.gradients(model).items():
        torch.testing.assert_close(grad, wanted[name])
    assert torch.equal(training.eval()(**inputs), eager.eval()(**inputs))


def test_gradient_flows_to_the_pictures_where_they_are_visible():
    inputs, truth = run.batch()
    inputs["images"].requires_grad_()
    training = AlignmentMaskedTraining(run.ours(), run.masking(drop=1.0))
    (grad,) = torch.autograd.grad(loss_of(training, inputs, truth), inputs["images"])
    removed = training.mask_images(**inputs)[1]
    assert not grad.movedim(1, -1)[removed].any()
    assert grad.movedim(1, -1)[~removed].any()


def masked_training(model, **options):
    return AlignmentMaskedTraining(model, AlignmentAwareMasking(*model.encode_dims, block=8, threshold=0.6), **options)


def losses(out):
    return [entry["loss"] for entry in read_log(out / "log.jsonl") if entry["kind"] == "train"]


def test_a_run_that_continues_hides_the_same(tmp_path, tiny):
    options = TrainOptions(max_steps=4, batch=2, log_every=1, checkpoint_every=2, keep_checkpoints=3, progress=False, cpu=True)
    data = SyntheticGRES("train", 24, image_size=64)

    def start(out, resume=False, wrap=masked_training):
        model = tiny.tiny_model(0.1)
        train(model, data, None, out, options, resume=resume, aml=wrap(model))
        return load_model(str(out)).state_dict()

    whole = start(tmp_path / "whole")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", tmp_path / "half" / "checkpoints" / "step-00000002")
    half = start(tmp_path / "half", resume=True)
    assert all(torch.equal(value, half[name]) for name, value in whole.items())
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")[2:]
    entry = read_log(tmp_path / "whole" / "log.jsonl")[-1]
    assert 0 < entry["aml/weak"] <= 1
    assert {"aml/candidate", "aml/masked", "aml/target_hidden", "loss"} <= entry.keys()
    assert "threshold=0.6" in json.loads((tmp_path / "whole" / "run.json").read_text())["aml"]["masking"]
    for wrap in (lambda _: None, lambda model: masked_training(model, clean_loss_weight=0.5)):
        with pytest.raises(ValueError, match=r"train: `aml` must be .* to continue the run"):
            start(tmp_path / "half", resume=True, wrap=wrap)


def test_two_processes_and_accumulation_train_as_one_with_the_whole_batch(tmp_path, tiny):
    options = {"max_steps": 3, "batch": 4, "log_every": 1, "lr": 2e-4, "aml": {"clean_loss_weight": 0.5}}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(PROGRAM)]
    process = subprocess.Popen([*command, str(tmp_path), json.dumps(options)], env=ENVIRONMENT)
    tiny.tiny_training(tmp_path / "one", **options)
    tiny.tiny_training(tmp_path / "one_2", accumulate=2, **options)
    wanted = {}
    for weight in (0.0, 0.5):
        training = AlignmentMaskedTraining(run.ours(), run.masking(drop=1.0), clean_loss_weight=weight)
        for seed in range(2):
            training.zero_grad()
            run.step(training, training, *run.batch(seed=seed))
            wanted[f"{weight}/{seed}"] = run.gradients(training.model)
    assert process.wait(timeout=240) == 0
    for name in ("one_2", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=1e-5), name
    assert (tmp_path / "two" / "metrics.json").is_file()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for result in ranks:
        for key, grads in wanted.items():
            for name, grad in grads.items():
                torch.testing.assert_close(result[key][name], grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(result["bridge"], training.masking.text_to_visual)
        assert result["sent"] == []  # nothing of the masking travels between processes
    assert not torch.equal(ranks[0]["removed"], ranks[1]["removed"])  # each process has its own noise


def test_the_loop_with_nothing_hidden_is_the_plain_loop_whatever_the_clean_pictures_weight(tmp_path, tiny):
    options = TrainOptions(max_steps=3, batch=4, log_every=1, progress=False, cpu=True)
    data, logs = SyntheticGRES("train", 24, image_size=64), []
    for weight in (None, 0.0, 0.25):
        model = tiny.tiny_model()
        masking = AlignmentAwareMasking(*model.encode_dims, threshold=0.0)
        aml = None if weight is None else AlignmentMaskedTraining(model, masking, clean_loss_weight=weight)
        train(model, data, None, tmp_path / str(weight), options, aml=aml)
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in read_log(tmp_path / str(weight) / "log.jsonl")])
    assert logs[1] == logs[0]
    assert sum(logs[2], ()) == pytest.approx(sum(logs[0], ()), rel=1e-4)


def test_the_loop_adds_up_gradients_once_per_step(tmp_path, tiny, monkeypatch):
    from accelerate import Accelerator

    waits, no_sync = [], Accelerator.no_sync
    monkeypatch.setattr(Accelerator, "no_sync", lambda self, model: waits.append(model) or no_sync(self, model))
    backward, scales = Accelerator.backward, []
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: scales.append(len(waits)) or backward(self, loss))
    tiny.tiny_training(tmp_path, max_steps=2, batch=4, accumulate=2, aml={"clean_loss_weight": 0.25})
    assert scales == [1, 2, 3, 3, 4, 5, 6, 6]  # two micro-batches of two passes: the last of each four does not wait


def test_bf16_training_with_the_loop(tmp_path, tiny):
    model = tiny.tiny_model()
    options = TrainOptions(max_steps=2, batch=4, amp="bf16", cpu=True, progress=False)
    train(model, SyntheticGRES("train", 8, image_size=64), None, tmp_path, options, aml=masked_training(model))
    batch = model.processor([torch.zeros(3, 64, 64, dtype=torch.uint8)], ["the red circle"])
    assert model(**batch).no_target.dtype == torch.float32


class Headless(nn.Module):
    def forward(self, images):
        return images


TWO = GresTarget(torch.ones(1, 32, 32, dtype=torch.bool))
IMAGES = torch.randn(2, 3, 32, 32)
IDS = torch.ones(2, 5, dtype=torch.long)


def wrapped(**options):
    return AlignmentMaskedTraining(run.ours(), options.pop("masking", run.masking()), **options)


BAD = {
    "a model without encode": (
        lambda: AlignmentMaskedTraining(Headless(), run.masking()),
        TypeError,
        "AlignmentMaskedTraining: `encode` must be given for a model without `encode`, got Headless;",
    ),
    "a model without sizes": (
        lambda: AlignmentMaskedTraining(run.ours()),
        TypeError,
        "AlignmentMaskedTraining: `masking` must be given for a model without `encode_dims`, got None;",
    ),
    "three encoders": (
        lambda: wrapped(encode=(1, 2, 3)),
        TypeError,
        "`encode` must be a callable or (image_encoder, text_encoder)",
    ),
    "a name as encoder": (lambda: wrapped(encode="encode"), TypeError, "`encode` must be a callable or"),
    "weight": (lambda: wrapped(clean_loss_weight=1.0), ValueError, "`clean_loss_weight` must be at least 0 and below 1, got 1.0."),
    "weight nan": (lambda: wrapped(clean_loss_weight=float("nan")), ValueError, "`clean_loss_weight` must be at least 0"),
    "no weight": (lambda: wrapped(clean_loss_weight=None), TypeError, "`clean_loss_weight` must be a number, got None."),
    "a class as masking": (lambda: wrapped(masking=AlignmentAwareMasking), TypeError, "`masking` must be a module, got <class"),
    "dtype": (
        lambda: wrapped(score_dtype=torch.int8),
        ValueError,
        "`score_dtype` must be one of None, torch.float32, torch.bfloat16, torch.float16, got torch.int8.",
    ),
    "dtype by name": (lambda: wrapped(score_dtype="bfloat16"), ValueError, "torch.float16, got 'bfloat16'."),
    "mode": (lambda: wrapped(score_mode="test"), ValueError, "`score_mode` must be one of 'eval', 'train', got 'test'."),
    "one result": (lambda: wrapped(encode=lambda *_: IMAGES)(IMAGES), TypeError, "must return (visual, tokens) or (visual,"),
    "a map of another batch": (
        lambda: wrapped(encode=lambda *_: (torch.rand(1, 8, 4, 4), torch.rand(2, 5, 8)))(IMAGES),
        ValueError,
        "AlignmentAwareMasking: `visual` must be (B, 8, h, w) with B=2, got (1, 8, 4, 4).",
    ),
    "patches in a row": (
        lambda: wrapped(encode=lambda *_: (torch.rand(2, 16, 8), torch.rand(2, 5, 8)))(IMAGES),
        ValueError,
        "AlignmentAwareMasking: `visual` must be (B, 8, h, w), got (2, 16, 8).",
    ),
    "targets of another batch": (
        lambda: wrapped()(IMAGES, IDS, torch.ones_like(IDS), targets=[TWO]),
        ValueError,
        "AlignmentAwareMasking: `targets` must be one per image with B=2, got 1.",
    ),
    "a mask of probabilities": (
        lambda: wrapped()(IMAGES, IDS, torch.ones_like(IDS), targets=torch.rand(2, 32, 32)),
        TypeError,
        "AlignmentAwareMasking: `targets` must be bool, got torch.float32.",
    ),
    "probabilities as valid": (
        lambda: wrapped()(IMAGES, IDS, torch.ones(2, 5)),
        TypeError,
        "AlignmentAwareMasking: `valid` must be bool or 0/1 integers, got torch.float32.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, expected = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_loop_refuses_a_wrapper_of_another_model_or_with_a_generator_of_its_own(tmp_path, tiny):
    model, data = tiny.tiny_model(), SyntheticGRES("train", 4, image_size=64)
    with pytest.raises(ValueError, match="train: `aml` must wrap the model that is trained"):
        train(model, data, None, tmp_path, aml=masked_training(tiny.tiny_model()))
    with pytest.raises(ValueError, match="train: `aml` must draw from the global generators"):
        train(model, data, None, tmp_path, aml=masked_training(model, generator=torch.Generator()))
