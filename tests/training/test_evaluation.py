from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gresbox.data import SyntheticGRES
from gresbox.metrics import GRESMetric
from gresbox.training import EvaluationOptions, evaluate


class Oracle(torch.nn.Module):
    """Answers with what was put in, at a size of its own, through the real post-processing."""

    def __init__(self, model, dataset, flip=()):
        super().__init__()
        self.model, self.processor, self.postprocess = model, model.processor, model.postprocess
        self.targets = [dataset[index].target for index in range(len(dataset))]
        self.flip, self.place = set(flip), 0

    def forward(self, images, input_ids, attention_mask):
        output = self.model(images, input_ids, attention_mask)
        targets = self.targets[self.place : self.place + len(images)]
        flags = torch.tensor([target.no_target != (self.place + i in self.flip) for i, target in enumerate(targets)])
        self.place += len(images)
        merged = torch.stack([target.merged for target in targets]).float() * 20 - 10
        return replace(output, merged=merged, no_target=flags.float() * 8 - 4)


@pytest.fixture
def dataset():
    return SyntheticGRES("val", 12, image_size=64)


def test_truth_scores_full_marks(tiny, dataset):
    scores = evaluate(Oracle(tiny.tiny_model(), dataset), dataset, EvaluationOptions(batch=5))
    assert {name: scores[name] for name in ("gIoU", "cIoU", "N_acc", "T_acc")} == dict.fromkeys(
        ("gIoU", "cIoU", "N_acc", "T_acc"), 100.0
    )
    empty = sum(dataset[index].target.no_target for index in range(12))
    assert 0 < empty < 12
    assert (scores["samples"], scores["no_target_share"]) == (12, pytest.approx(100 * empty / 12))


def test_a_wrong_flag_costs_what_the_metric_says(tiny, dataset):
    wrong = [0, 1, *[index for index in range(12) if dataset[index].target.no_target][:1]]
    scores = evaluate(Oracle(tiny.tiny_model(), dataset, flip=wrong), dataset, EvaluationOptions(batch=4, workers=1))
    assert scores["gIoU"] < 100
    assert scores["N_acc"] < 100 or scores["T_acc"] < 100


@pytest.mark.parametrize("resized", [False, True])
def test_it_is_predict_and_the_metric(tiny, resized):
    model = tiny.tiny_model()
    dataset = SyntheticGRES("val", 7, image_size=96)  # the model's square is 64
    metric = GRESMetric()
    for index in range(7):
        sample = dataset[index]
        picture = sample.image
        truth = sample.target.merged
        if resized:
            picture = F.interpolate(picture[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
            picture = picture.round().to(torch.uint8)
            truth = F.adaptive_avg_pool2d(truth[None].float(), 64)[0] >= 0.5
        answer = model.predict(picture, sample.text, no_target_threshold=1.0)  # the mask as it is, as the benchmark adds it up
        metric.update([answer.mask], [truth], torch.tensor([answer.no_target_prob > 0.54]), torch.tensor([sample.target.no_target]))
    wanted = {name: float(value) for name, value in metric.compute().items()}
    options = EvaluationOptions(batch=3, resized=resized, no_target_threshold=0.54)
    scores = evaluate(model, dataset, options)
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, abs=1.0 if resized else 1e-6), name  # resized: predict rounds the picture


def test_the_model_is_left_as_it_was(tiny, dataset):
    for mode in (True, False):
        model = tiny.tiny_model().train(mode)
        evaluate(model, dataset, EvaluationOptions(limit=2))
        assert model.training is mode


def test_a_limit_and_a_metric_of_ones_own(tiny, dataset):
    class Counts(GRESMetric):
        def compute(self):
            return {"gIoU twice": 2 * super().compute()["gIoU"]}

    model = tiny.tiny_model()
    first = evaluate(model, dataset, EvaluationOptions(limit=4))
    assert first["samples"] == 4
    assert evaluate(model, dataset, EvaluationOptions(limit=4), metric=Counts())["gIoU twice"] == pytest.approx(2 * first["gIoU"])


def test_no_samples_are_refused(tiny):
    with pytest.raises(ValueError, match="`dataset` must hold at least one sample"):
        evaluate(tiny.tiny_model(), SyntheticGRES("val", 0, image_size=64))
