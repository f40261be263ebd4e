from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset

from gresbox.data import Resize, SyntheticGRES
from gresbox.data.catalogue import BENCHMARKS
from gresbox.metrics import GRECMetric, GRESMetric, RefZOMMetric, RESMetric, RRefCOCOMetric, ThresholdSweep, gres_metrics
from gresbox.models import create_model
from gresbox.structures import GresSample, GresTarget
from gresbox.training import (
    Answer,
    EvaluationOptions,
    PredictionFile,
    PredictionWriter,
    Scorer,
    default_metric,
    evaluate,
    make_metric,
    score_predictions,
)
from gresbox.training.batches import truth_of
from gresbox.training.scoring import check_metric


def row(*places: int) -> torch.Tensor:
    """A mask of one row of six pixels."""
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, list(places)] = True
    return mask


def sample(sent_id: int, *places: int, ref_id: int = 1, kind: str | None = None, exists: bool = True) -> GresSample:
    masks = row(*places)[None][: len(places)]
    kind = kind or ("one" if places else "zero")
    return GresSample(torch.zeros(3, 1, 6, dtype=torch.uint8), "it", GresTarget(masks), 1, ref_id, sent_id, kind, exists)


SAMPLES = [sample(1, 0, 1), sample(2, 2, 3, kind="many"), sample(3, exists=False), sample(4, exists=False)]
ANSWERS = [
    Answer(1, row(0, 1, 2), 0.2),
    Answer(2, row(3, 4), 0.8),  # wrongly "nothing", with a mask
    Answer(3, row(5), 0.9),  # rightly, with a mask
    Answer(4, row(0, 5), 0.4),
]


def scored(metric: object = None, answers: list[Answer] = ANSWERS, data: object = SAMPLES, **options: object) -> dict[str, float]:
    scorer = Scorer(data, metric, **options)
    scorer.add(answers, [truth_of(one.target, one) for one in SAMPLES], range(4))
    return scorer.compute()


def test_grefcoco_adds_the_mask_as_predicted():
    scores = scored()
    assert scores == {
        "gIoU": pytest.approx(100 * (2 / 3 + 0 + 1 + 0) / 4),
        "cIoU": pytest.approx(100 * 2 / (3 + 3 + 0 + 2)),  # the second mask counts although the answer is "nothing"
        "N_acc": 50,
        "T_acc": 50,
        "Pr@0.7": 0,
        "Pr@0.8": 0,
        "Pr@0.9": 0,
        "samples": 4,
        "no_target_share": 50,
    }


def test_the_others_see_an_empty_mask_where_the_answer_is_nothing():
    refzom = scored("refzom")
    assert (refzom["mIoU_one"], refzom["mIoU_many"], refzom["Acc"]) == (pytest.approx(200 / 3), 0, 50)
    assert refzom["oIoU"] == pytest.approx(100 * 2 / (3 + 2))
    robust = scored("rrefcoco")
    assert robust == pytest.approx(
        {"mIoU": 100 / 3, "oIoU": 40, "mRR": 50, "rIoU": 100 * 2 / (5 + 2), "samples": 4, "no_target_share": 50}
    )
    with_targets = Scorer(SAMPLES, "res")
    with_targets.add(ANSWERS[:2], [truth_of(one.target, one) for one in SAMPLES[:2]], range(2))
    assert with_targets.compute()["oIoU"] == pytest.approx(40)


def test_boxes_go_where_the_answer_is_nothing():
    box, score = torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([0.9]).double()
    boxes = [Answer(one.sent_id, None, one.no_target, box, score) for one in ANSWERS]
    truth = scored("grec", boxes)
    assert (truth["F1"], truth["N_acc"], truth["T_acc"]) == (50, 50, 50)
    always = scored("grec", boxes, no_target_threshold=1.0)
    assert (always["F1"], always["N_acc"], always["T_acc"]) == (25, 0, 100)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.8, 0.9, 1.0])
def test_the_threshold_is_strict(threshold):
    flags = torch.tensor([answer.no_target > threshold for answer in ANSWERS])
    wanted = gres_metrics([one.mask for one in ANSWERS], [one.target.merged for one in SAMPLES], flags)
    scores = scored(no_target_threshold=threshold)
    assert {name: scores[name] for name in wanted} == pytest.approx({name: float(value) for name, value in wanted.items()})


def test_the_metrics_own_rule_decides_without_a_probability_or_a_threshold():
    masks = [Answer(one.sent_id, one.mask) for one in ANSWERS]
    for rule, pixels, right in (("empty_mask", 1, 0), ("pixels", 2, 50), ("pixels", 3, 100)):
        metric = GRESMetric(no_target_rule=rule, min_pixels=pixels)
        assert scored(metric, masks)["N_acc"] == right
        assert scored(GRESMetric(no_target_rule=rule, min_pixels=pixels), no_target_threshold=None)["N_acc"] == right


def test_answers_without_a_probability_get_the_numbers_of_res_beside():
    masks = [Answer(one.sent_id, one.mask) for one in ANSWERS]
    scores = scored(None, masks)
    assert (scores["mIoU"], scores["oIoU"]) == (pytest.approx(100 * (2 / 3 + 1 / 3) / 2), pytest.approx(100 * 3 / (3 + 3)))
    assert scores["Pr@0.5"] == 50
    assert "mIoU" not in scored("gres", masks)
    assert "mIoU" not in scored(None)
    res = RESMetric()
    res.update([one.mask for one in ANSWERS[:2]], [one.target.merged for one in SAMPLES[:2]])
    assert all(scores[name] == float(value) for name, value in res.compute().items())  # also what both of them report


def test_any_metric_with_the_same_update():
    class Counter(torch.nn.Module):
        def reset(self):
            self.seen = []

        def update(self, pred, target, pred_no_target, target_no_target):
            self.seen.append((len(pred), len(target), pred_no_target.tolist(), target_no_target.tolist()))

        def compute(self):
            return {"seen": torch.tensor(len(self.seen)), "each": torch.zeros(2)}

    counter = Counter()
    assert scored(counter) == {"seen": 1.0, "samples": 4.0, "no_target_share": 50.0}
    assert counter.seen == [(4, 4, [False, True, True, False], [False, False, True, True])]


def test_what_comes_again_does_not_count_again():
    scorer = Scorer(SAMPLES)
    truths = [truth_of(one.target, one) for one in SAMPLES]
    for places in ([0, 1], [1, 2, 3], [3]):
        scorer.add([ANSWERS[place] for place in places], [truths[place] for place in places], places)
    assert scorer.compute()["gIoU"] == scored()["gIoU"]


class Reads:
    """A data set of a benchmark's files, as far as scoring looks at it."""

    def __init__(self, folder):
        self.benchmark = BENCHMARKS[folder]


@pytest.mark.parametrize(
    ("dataset", "metric"),
    [
        (SyntheticGRES("val", 2), "gres"),
        (SAMPLES, "gres"),
        (Reads("grefcoco"), "gres"),
        *((Reads(folder), "res") for folder in ("refcoco", "refcoco+", "refcocog", "refcocom")),
        (Reads("ref-zom"), "refzom"),
        *((Reads(folder), "rrefcoco") for folder in ("rrefcoco", "rrefcoco+", "rrefcocog")),
        (Subset(Subset(Reads("ref-zom"), [0]), [0]), "refzom"),
    ],
)
def test_the_metric_follows_the_data(dataset, metric):
    assert default_metric(dataset) == metric
    kinds = {"gres": GRESMetric, "res": RESMetric, "refzom": RefZOMMetric, "rrefcoco": RRefCOCOMetric}
    assert type(Scorer(dataset).metric) is kinds[metric]
    assert type(Scorer(dataset, "grec").metric) is GRECMetric


WRONG = {
    "another benchmark's": (
        lambda: Scorer(Reads("refcoco"), "rrefcoco"),
        "must be one of 'res', 'gres', 'grec' on RefCOCO, got 'rrefcoco'.",
    ),
    "one for zero and many": (
        lambda: Scorer(Reads("refcocog"), "refzom"),
        "must be one of 'res', 'gres', 'grec' on RefCOCOg, got 'refzom'.",
    ),
    "one for one target": (
        lambda: Scorer(Reads("grefcoco"), "res"),
        "must be one of 'gres', 'grec', 'refzom' on gRefCOCO, got 'res'.",
    ),
    "on synthetic data": (lambda: check_metric("f", "res", SyntheticGRES("val", 1)), "on the synthetic benchmark, got 'res'."),
    "no target at all": (
        lambda: scored("res"),
        "must not be 'res' where an expression has no target, got sent_id 3 without one; 'gres' scores both.",
    ),
    "unknown": (
        lambda: Scorer(SAMPLES, "miou"),
        "`metric` must be one of 'gres', 'res', 'refzom', 'rrefcoco', 'grec', got 'miou'.",
    ),
    "unknown in the options": (lambda: EvaluationOptions(metric="miou"), "EvaluationOptions: `metric` must be one of None, 'gres'"),
    "an unknown option": (
        lambda: make_metric("grec", iou="giou"),
        "'grec' has no option 'iou'. Options: score_threshold, iou_type, overlap",
    ),
    "an option of none": (lambda: make_metric("refzom", rule=1), "'refzom' has no option 'rule'. Options: none."),
    "an option's value": (
        lambda: make_metric("gres", no_target_rule="fifty"),
        "`no_target_rule` must be one of 'empty_mask', 'pixels'",
    ),
    "an option's type": (
        lambda: make_metric("gres", min_pixels="many"),
        "an option of 'gres' must be of its own type, got another (",
    ),
    "a threshold": (lambda: Scorer(SAMPLES, no_target_threshold=1.5), "`no_target_threshold` must be in [0, 1], got 1.5."),
    "a threshold that is none": (
        lambda: Scorer(SAMPLES, no_target_threshold=math.nan),
        "`no_target_threshold` must be in [0, 1], got nan.",
    ),
    "a sweep without probabilities": (
        lambda: scored(None, [Answer(one.sent_id, one.mask) for one in ANSWERS], sweep=ThresholdSweep()),
        '`sweep` must be None where answers have no probability of "nothing"',
    ),
    "boxes that are not there": (lambda: scored("grec"), "`answers` must have what the metric reads, got one without it."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_question_that_has_no_answer(case):
    call, expected = WRONG[case]
    with pytest.raises(ValueError, match=": ") as caught:
        call()
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert message.endswith(".")


def write(path: Path, answers: list[Answer]) -> Path:
    with PredictionWriter(path) as writer:
        writer.add(answers)
    return path


@given(st.randoms(use_true_random=False), st.sampled_from([None, "gres", "refzom", "rrefcoco"]), st.floats(0, 1))
def test_a_file_scores_as_its_answers_do_in_any_order(tmp_path_factory, random, metric, threshold):
    answers = list(ANSWERS)
    random.shuffle(answers)
    path = write(tmp_path_factory.mktemp("file") / "p.jsonl", answers)
    scores = score_predictions(path, SAMPLES, metric=metric, no_target_threshold=threshold)
    assert scores == scored(metric, no_target_threshold=threshold)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_a_sweep_says_what_scoring_at_that_threshold_says(scores, threshold):
    answers = [Answer(one.sent_id, one.mask, score) for one, score in zip(ANSWERS, scores, strict=True)]
    sweep = ThresholdSweep([threshold])
    wanted = scored(None, answers, no_target_threshold=threshold, sweep=sweep)
    found = sweep.compute()
    for name in ("gIoU", "cIoU", "N_acc", "T_acc"):
        assert float(found[name][0]) == pytest.approx(wanted[name])


def test_a_limit(tmp_path):
    path = write(tmp_path / "p.jsonl", ANSWERS[:3])
    assert score_predictions(path, SAMPLES, limit=3)["samples"] == 3
    assert score_predictions(write(tmp_path / "p.jsonl", ANSWERS), SAMPLES, limit=9)["samples"] == 4
    with pytest.raises(ValueError, match="must answer all 4 expressions, got no answer to 1 of them, the first is sent_id 4"):
        score_predictions(write(path, ANSWERS[:3]), SAMPLES)
    with pytest.raises(ValueError, match="`limit` must be at least 1, got 0"):
        score_predictions(path, SAMPLES, limit=0)


LACKING = {
    "boxes": ({"metric": "grec"}, "must have `boxes`, which GRECMetric reads, got none."),
    "masks": (
        {"answers": [Answer(one.sent_id, None, 0.5, torch.zeros(0, 4), torch.zeros(0)) for one in ANSWERS]},
        "must have `mask`, which GRESMetric reads",
    ),
    "probabilities": (
        {"answers": [Answer(one.sent_id, one.mask) for one in ANSWERS], "sweep": ThresholdSweep()},
        "must have `no_target`, the probability",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_file_without_what_is_read(tmp_path, case):
    options, expected = LACKING[case]
    path = write(tmp_path / "p.jsonl", options.get("answers", ANSWERS))
    with pytest.raises(ValueError, match="PredictionFile: line 1 of ") as caught:
        score_predictions(path, SAMPLES, **{name: value for name, value in options.items() if name != "answers"})
    assert expected in str(caught.value)


@pytest.mark.parametrize("metric", [None, "gres", "refzom"])
@pytest.mark.parametrize("resized", [False, True])
def test_evaluation_and_its_file_agree_to_the_last_bit(tiny, tmp_path, metric, resized):
    data, model = SyntheticGRES("val", 20, seed=3, image_size=96), tiny.tiny_model()  # the model's square is 64
    path, threshold = tmp_path / "p.jsonl", 0.54  # in the middle of what this model says
    options = EvaluationOptions(batch=8, resized=resized, no_target_threshold=threshold)
    sweeps = [ThresholdSweep(), ThresholdSweep()] if metric is None else [None, None]
    scores = evaluate(model, data, options, metric=metric, predictions=path, sweep=sweeps[0])
    assert len({answer.no_target > threshold for answer in PredictionFile(path)}) == 2
    assert all(answer.mask.any() for answer in PredictionFile(path))  # as predicted, whatever is decided
    truth = SyntheticGRES("val", 20, seed=3, image_size=96, transform=Resize(64) if resized else None)
    again = score_predictions(path, truth, metric=metric, no_target_threshold=threshold, sweep=sweeps[1])
    assert scores == again
    if metric is None:
        first, second = (sweep.compute() for sweep in sweeps)
        assert all(torch.equal(first[name], second[name]) for name in first)


class Sure(torch.nn.Module):
    """A model with surer queries."""

    def __init__(self, model):
        super().__init__()
        self.model, self.processor, self.postprocess = model, model.processor, model.postprocess

    def forward(self, *args, **options):
        output = self.model(*args, **options)
        return replace(output, instances=replace(output.instances, score_logits=output.instances.score_logits + 4.5))


@pytest.mark.parametrize("name", ["instalign", "igvg"])
def test_boxes_of_an_evaluation_and_of_its_file_agree(tiny, tmp_path, name):
    torch.manual_seed(0)
    model = Sure(tiny.tiny_model()) if name == "instalign" else create_model("igvg_tiny")
    data, path = SyntheticGRES("val", 20, seed=3, image_size=96), tmp_path / "p.jsonl"
    options = EvaluationOptions(no_target_threshold=None)
    evaluate(model, data, options, metric="grec", predictions=path)
    level = sorted(float(answer.scores.max()) for answer in PredictionFile(path))[10]
    metric = make_metric("grec", score_threshold=level, overlap_threshold=-0.5)
    scores = evaluate(model, data, options, metric=metric, predictions=path)
    assert 0 < scores["T_acc"] < 100
    assert scores == score_predictions(path, data, metric=metric, no_target_threshold=None)
    assert min(float(answer.scores.min()) for answer in PredictionFile(path)) < level  # a lower threshold can be asked for later


def test_a_model_without_boxes():
    model, data = create_model("caris_tiny"), SyntheticGRES("val", 2)
    with pytest.raises(ValueError, match="evaluate: `metric` must not be 'grec' for Caris, which predicts no boxes"):
        evaluate(model, data, EvaluationOptions(metric="grec"))
    scores = evaluate(model, data)
    assert {"gIoU", "mIoU", "oIoU"} <= scores.keys()
