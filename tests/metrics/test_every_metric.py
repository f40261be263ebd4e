"""What every metric promises: its laws, and a state that is reset, moved, copied, merged and that grows by scalars only."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

import gresbox.metrics as library

NAMES = ("gres", "grec", "refzom", "rrefcoco", "res", "coverage", "threshold")
each_metric = pytest.mark.parametrize("name", NAMES)
quiet = pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")


@pytest.fixture
def by_function(processes):
    def call(name, samples, **options):
        subject = processes.SUBJECTS[name]
        index = list(range(len(samples["kind"])))
        return getattr(library, subject.function)(*processes.taken(samples, subject.takes, index), **options)

    return call


@pytest.fixture
def updated(processes):
    def build(name, samples, index, size=4, ids=None, **options):
        subject = processes.SUBJECTS[name]
        metric = subject.build(**options)
        for part in processes.batches(index, size):
            named = {} if ids is None else {"sample_ids": ids[part]}
            metric.update(*processes.taken(samples, subject.takes, part), **named)
        return metric

    return build


def scalars(result):
    return {key: float(value) for key, value in result.items() if value.ndim == 0}


def assert_same(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].tolist() == pytest.approx(want[key].tolist(), abs=tolerance, nan_ok=True), key


@each_metric
@quiet
@given(count=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_values_are_percentages_whatever_the_order_and_the_batches(processes, by_function, updated, name, count, seed):
    samples = processes.make_samples(count, seed)
    whole = by_function(name, samples)
    assert all(value.dtype == torch.float64 for value in whole.values())
    for key, value in whole.items():
        if key not in ("threshold", "samples"):
            assert bool((value.isnan() | ((value >= 0) & (value <= 100))).all()), key
    index = list(range(count))
    shuffle = random.Random(seed)
    shuffle.shuffle(index)
    assert_same(updated(name, samples, index, size=shuffle.randint(1, count)).compute(), whole)


def perfect(samples):
    answers = [
        {"boxes_xyxy": boxes.flip(0), "scores": torch.linspace(0.7001, 1, max(len(boxes), 1))[: len(boxes)]}
        for boxes in samples["boxes"]
    ]
    false = ~samples["exists"]
    target = [mask if not empty else mask & False for mask, empty in zip(samples["target"], samples["is_none"], strict=True)]
    right = {**samples, "target": target, "pred": target, "says_none": samples["is_none"], "found": answers}
    return {**right, "score": samples["is_none"].double(), "relative": samples["relative"]}, false


def emptied(samples):
    nothing = [{"boxes_xyxy": torch.zeros(0, 4), "scores": torch.zeros(0)}] * len(samples["kind"])
    masks = [mask & False for mask in samples["pred"]]
    flags = torch.ones(len(masks), dtype=torch.bool)
    return {**samples, "pred": masks, "says_none": flags, "found": nothing, "score": torch.ones(len(masks))}


@quiet
@given(seed=st.integers(0, 10**6))
def test_perfect_predictions_give_100(processes, by_function, seed):
    samples, false = perfect(processes.make_samples(12, seed))
    for name in ("gres", "grec", "refzom", "res"):
        for key, value in scalars(by_function(name, samples)).items():
            absent = key.endswith("_acc") and not samples["is_none"].any()  # there the evaluator has 0
            unanswerable = name == "res" and samples["is_none"].any()  # every expression of RES has a target
            if not (absent or unanswerable or math.isnan(value)):
                assert value == pytest.approx(100, abs=1e-10), (name, key)
    some = [mask | True for mask in samples["target"]]
    sentences = {**samples, "target": some, "pred": [mask & ~flag for mask, flag in zip(some, false, strict=True)]}
    assert all(value == pytest.approx(100, abs=1e-10) for value in scalars(by_function("rrefcoco", sentences)).values())
    assert all(
        value == pytest.approx(100, abs=1e-10)
        for value in scalars(by_function("res", {**samples, "pred": some, "target": some})).values()
    )
    centres = torch.zeros(12, 3, 2)
    for place, boxes in enumerate(samples["relative"]):
        centres[place, : len(boxes)] = boxes[:, :2]
    value = scalars(by_function("coverage", {**samples, "points": centres}))["CoverAcc"]
    assert math.isnan(value) or value == 100
    curves = by_function("threshold", samples, thresholds=[0.0, 0.5, 0.99])
    for key in ("gIoU", "cIoU", "N_acc", "T_acc", "F1", "AUROC", "AP"):
        assert bool((curves[key].isnan() | ((curves[key] - 100).abs() < 1e-10)).all()), key


@quiet
@given(seed=st.integers(0, 10**6))
def test_all_empty_predictions_are_right_about_nothing_only(processes, by_function, seed):
    samples = emptied(processes.make_samples(12, seed))
    has_none, has_some = bool(samples["is_none"].any()), not bool(samples["is_none"].all())
    for name in ("gres", "grec"):
        got = scalars(by_function(name, samples))
        if has_none:
            assert got["N_acc"] == 100
        if has_some:
            assert got["T_acc"] == 0
        assert got.get("gIoU", got.get("F1")) == pytest.approx(100 * float(samples["is_none"].double().mean()), abs=1e-10)
    zom = scalars(by_function("refzom", samples))
    assert all(value == (100 if key == "Acc" else 0) or math.isnan(value) for key, value in zom.items())
    assert set(scalars(by_function("res", samples)).values()) <= {0.0}
    curves = by_function("threshold", samples, thresholds=[0.5])
    assert float(curves["N_acc"]) == 100 or not has_none
    assert float(curves["T_acc"]) == 0 or not has_some
    sentences = by_function("rrefcoco", {**samples, "target": [mask | True for mask in samples["target"]]})
    assert scalars(sentences) == {"mIoU": 0, "oIoU": 0, "mRR": 100, "rIoU": 0}


@each_metric
@quiet
def test_a_repeated_sample_counts_once_when_it_is_named(processes, updated, name):
    samples = processes.make_samples(11)
    index = list(range(11))
    filled = [*index, 3, 0, 3, *index[:5]]
    once = updated(name, samples, index).compute()
    assert_same(updated(name, samples, filled, ids=samples["sample_ids"]).compute(), once)
    assert_same(updated(name, samples, filled, ids=samples["sample_ids"], size=1).compute(), once)
    wrong = updated(name, samples, filled).compute()
    assert any(wrong[key].tolist() != pytest.approx(once[key].tolist(), nan_ok=True) for key in once)


@each_metric
@quiet
def test_per_sample_results_of_class_and_function(processes, by_function, updated, name):
    samples = processes.make_samples(9)
    index = list(range(9))
    whole = by_function(name, samples, per_sample=True)
    metric = updated(name, samples, index, per_sample=True)
    assert_same(metric.compute(), whole)
    listed = {key for key, value in whole.items() if len(value.shape) and len(value) == 9}
    assert len(listed) >= 2
    assert not any(key in by_function(name, samples) for key in listed - {"threshold"})
    named = updated(name, samples, [*index, 0], ids=samples["sample_ids"], per_sample=True).compute()
    assert named.pop("sample_id").tolist() == samples["sample_ids"].tolist()
    assert_same(named, whole)
    for key, value in updated(name, samples, [2], per_sample=True).compute().items():
        assert value.shape == ((1,) if key in listed else whole[key].shape), key


@each_metric
@quiet
def test_the_state_is_sums_or_a_few_numbers_per_sample(processes, updated, name):
    samples = processes.make_samples(20)
    index = list(range(20))
    for options in ({}, {"per_sample": True}):
        metric = updated(name, samples, index, **options)
        kept = sum(part.numel() for part in metric.records) + sum(part.numel() for part in metric.keys)
        expected = 20 * (len(metric.columns) + 3) if options or metric.keeps_rows else 0
        assert kept == expected
        assert metric.sums.numel() == len(metric.columns) <= 20
        assert set(metric.metric_state) == {"sums", "records", "keys"}


@each_metric
@quiet
def test_reset_copy_pickle_merge_and_forward(processes, updated, name):
    samples = processes.make_samples(10)
    index = list(range(10))
    whole = updated(name, samples, index).compute()
    metric = updated(name, samples, index[6:])
    metric.reset()
    assert not metric.sums.any()
    assert not metric.records
    takes = processes.SUBJECTS[name].takes
    for part in processes.batches(index, 3):
        batch_value = metric(*processes.taken(samples, takes, part))
        assert batch_value.keys() == whole.keys()
    assert_same(metric.compute(), whole)
    assert_same(copy.deepcopy(metric).compute(), whole)
    assert_same(pickle.loads(pickle.dumps(metric)).compute(), whole)
    first, second = updated(name, samples, index[:4]), updated(name, samples, index[4:])
    first.merge_state(second)
    assert_same(first.compute(), whole)
    single = pickle.loads(pickle.dumps(updated(name, samples, [1], per_sample=True)))
    assert any(value.shape == (1,) for value in single.compute().values())


@each_metric
@quiet
def test_all_states_move_between_devices(processes, updated, name):
    samples = processes.make_samples(4)
    metric = updated(name, samples, [0, 1], per_sample=True).to("meta")
    assert metric.device.type == metric.sums.device.type == "meta"
    assert {part.device.type for part in [*metric.records, *metric.keys]} == {"meta"}
    metric.update(*processes.taken(samples, processes.SUBJECTS[name].takes, [2]))  # inputs elsewhere are taken along
    assert {part.device.type for part in [metric.sums, *metric.records, *metric.keys]} == {"meta"}


@each_metric
@quiet
@pytest.mark.parametrize("stacked", [False, True])
def test_tensors_on_a_device_give_the_same(processes, by_function, name, stacked, monkeypatch):
    """What runs on another device than the CPU, run on the CPU."""
    samples = processes.make_samples(10)
    if stacked:
        shape = (7, 9)
        samples |= {key: torch.stack([torch.rand(shape) < 0.3 for _ in range(10)]) for key in ("pred", "target")}
    want = by_function(name, samples, per_sample=True)
    monkeypatch.setattr("gresbox.metrics._overlap._uses_numpy", lambda device: False)
    assert_same(by_function(name, samples, per_sample=True), want)


@quiet
def test_metrics_work_in_a_collection(processes):
    samples = processes.make_samples(8)
    both = {"gres": library.GRESMetric(), "pixels": library.GRESMetric(no_target_rule="pixels", min_pixels=9)}
    collection = MetricCollection(both, compute_groups=False)
    collection.update(samples["pred"], samples["target"], None, samples["is_none"])
    names = ("pred", "target")
    for prefix, options in {"gres": {}, "pixels": {"no_target_rule": "pixels", "min_pixels": 9}}.items():
        want = library.gres_metrics(*(samples[name] for name in names), None, samples["is_none"], **options)
        got = collection.compute()
        assert float(got[f"{prefix}_gIoU" if f"{prefix}_gIoU" in got else "gIoU"]) == pytest.approx(float(want["gIoU"]), abs=1e-10)


@each_metric
def test_no_sample_at_all_is_nan_and_one_warning(processes, by_function, name):
    with pytest.warns(UserWarning, match="was added") as caught:
        result = by_function(name, {**processes.make_samples(1), **nothing()})
    assert len(caught) == 1
    assert all(math.isnan(value) for key, value in scalars(result).items() if key != "samples")
    with pytest.warns(UserWarning, match="before the ``update`` method") as caught:
        result = processes.SUBJECTS[name].build().compute()
    assert len(caught) == 1
    assert all(math.isnan(value) for key, value in scalars(result).items() if key != "samples")


def nothing():
    flags = torch.zeros(0, dtype=torch.bool)
    lists = {key: [] for key in ("pred", "target", "kind", "found", "boxes", "relative")}
    numbers = {"score": torch.zeros(0), "points": torch.zeros(0, 3, 2), "group": torch.zeros(0, dtype=torch.int64)}
    return {**lists, **numbers, "says_none": flags, "is_none": flags, "exists": flags}


@each_metric
@pytest.mark.parametrize("kinds", [("zero",), ("one", "many")])
def test_one_sort_of_sample_alone_gives_numbers_and_at_most_one_warning(processes, by_function, name, kinds):
    samples = processes.make_samples(30)
    keep = [place for place, kind in enumerate(samples["kind"]) if kind in kinds]
    chosen = {key: processes.taken(samples, (key,), keep)[0] for key in samples}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = by_function(name, chosen)
    undefined = [key for key, value in scalars(result).items() if math.isnan(value)]
    assert len(caught) == bool(undefined)
    for key in undefined:
        assert key in str(caught[0].message)


@each_metric
@quiet
def test_a_picture_of_the_numbers(processes, updated, name, tmp_path):
    samples = processes.make_samples(12)
    metric = updated(name, samples, list(range(12)))
    figure, axes = metric.plot()
    figure.savefig(tmp_path / "one.png")
    assert len(axes) == 1
    listed = updated(name, samples, list(range(12)), per_sample=True)
    figure, axes = listed.plot([listed.compute(), metric.compute()] if name == "threshold" else None)
    figure.savefig(tmp_path / "two.png")
    assert len(axes) == (2 if name in ("gres", "refzom", "rrefcoco", "res") else 1)
    _, again = metric.plot(metric.compute(), ax=axes[0])
    assert again == [axes[0]]


def test_a_picture_of_undefined_numbers(tmp_path):
    metric = library.GRESMetric()
    empty = torch.zeros(1, 2, 2, dtype=torch.bool)
    metric.update(empty, empty)
    with pytest.warns(UserWarning, match="no expression has a target"):
        figure, axes = metric.plot()
    figure.savefig(tmp_path / "nan.png")
    assert "undefined" in [text.get_text() for text in axes[0].texts]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    metric = library.RESMetric()
    metric.update(torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(
        ImportError, match=r"RESMetric: `matplotlib` is not installed; install it with pip install 'gresbox\[viz\]'"
    ):
        metric.plot()
