"""GRESMetric against the benchmark's own evaluator, its truth table, and its invariances."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.metrics import GRESMetric, gres_metrics

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "metrics_grefcoco.json"
NAMES = ["gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]


@pytest.fixture(scope="module")
def data(golden):
    arrays = golden("metrics_grefcoco")
    height, width = (int(size) for size in arrays["shape"])

    def unpack(packed):
        bits = np.unpackbits(packed, axis=1)[:, : height * width]
        return torch.from_numpy(bits.reshape(-1, height, width).astype(bool))

    logits = torch.from_numpy(arrays["nt_logits"])
    return {
        "pred": unpack(arrays["pred"]),
        "target": unpack(arrays["gt"]),
        "is_none": torch.from_numpy(arrays["gt_nt"]),
        "logits": logits,
        "says_none": logits.sigmoid().argmax(1) == 1,  # the model's sigmoid ties one pair of saturated logits
        "ivg_scores": torch.from_numpy(arrays["ivg_scores"]),
    }


@pytest.fixture(scope="module")
def official():
    return json.loads(GOLDEN.read_text())


def in_percent(results):
    return {name: value * (100.0 if name.endswith("_acc") else 1.0) for name, value in results.items() if name in NAMES}


def assert_equal(got, want):
    assert list(got)[: len(NAMES)] == NAMES
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in got.values())
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(value, abs=1e-9), name


def test_main(data, official):
    got = gres_metrics(data["pred"], data["target"], data["says_none"], data["is_none"])
    assert_equal(got, in_percent(official["main"]["res"]))


def test_other_decisions(data, official):
    for key, says_none in {
        "main_without_sigmoid_on_nt": data["logits"].argmax(1) == 1,
        "instancevg_gres": ~(data["ivg_scores"] > 0.7).any(1),
    }.items():
        got = gres_metrics(data["pred"], data["target"], says_none, data["is_none"])
        record = official[key]
        want = in_percent(record["res"]) if "res" in record else {name: record[name] for name in ("gIoU", "cIoU", "T_acc", "N_acc")}
        assert_equal(got, want)


@pytest.mark.parametrize(("rule", "key"), [("empty_mask", "empty_mask_rule"), ("pixels", "fifty_pixel_rule")])
def test_rules_that_read_the_mask(data, official, rule, key):
    got = gres_metrics(data["pred"], data["target"], None, data["is_none"], no_target_rule=rule)
    assert_equal(got, in_percent(official[key]["res"]))


def test_per_sample(data, official):
    got = gres_metrics(data["pred"], data["target"], data["says_none"], data["is_none"], per_sample=True)
    rows = torch.stack([got[name].double() for name in ("no_target", "intersection", "union", "iou")], dim=1)
    want = torch.tensor(official["per_sample"], dtype=torch.float64)
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-12)


def test_targets_only_gives_zero_accuracies_as_the_evaluator_does(data, official):
    keep = ~data["is_none"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gres_metrics(data["pred"][keep], data["target"][keep], data["says_none"][keep], data["is_none"][keep])
    assert_equal(got, in_percent(official["targets_only"]["res"]))


def test_two_sources_add_up(data, official):
    """The evaluator's row for one source is the metric of that subset."""
    index = torch.arange(len(data["pred"]))
    refcoco = ~data["is_none"] & (index % 3 == 0)
    for source, keep in {"refcoco": refcoco, "grefcoco": ~refcoco, "full": torch.ones_like(refcoco)}.items():
        got = gres_metrics(data["pred"][keep], data["target"][keep], data["says_none"][keep], data["is_none"][keep])
        assert_equal(got, in_percent(official["two_sources"]["res"][source]))


def test_where_the_evaluator_divides_by_zero_is_nan_and_one_warning(data):
    keep = data["is_none"]
    right = keep & data["says_none"]
    for chosen, undefined in [
        (keep, {"T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"}),
        (right, {"cIoU", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"}),
    ]:
        metric = GRESMetric()
        metric.update(data["pred"][chosen], data["target"][chosen], data["says_none"][chosen], data["is_none"][chosen])
        with pytest.warns(UserWarning, match="no expression has a target") as caught:
            got = metric.compute()
        assert len(caught) == 1
        assert {name for name, value in got.items() if value.isnan()} == undefined


def test_no_expression_at_all_is_nan_throughout():
    with pytest.warns(UserWarning, match="no expression was added"):
        got = gres_metrics([], [])
    assert all(value.isnan() for value in got.values())


def test_targets_without_a_pixel_warn_about_ciou():
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    no = torch.tensor([False])
    with pytest.warns(UserWarning, match="no pixel is predicted or true"):
        got = gres_metrics(empty, empty, no, no)
    assert got["cIoU"].isnan()
    assert float(got["gIoU"]) == 0


def test_thresholds_are_compared_in_float64():
    target = torch.ones(1, 1, 10, dtype=torch.bool)
    pred = target.clone()
    pred[..., 7:] = False  # IoU is 7 / 10, which float32 stores below 0.7
    assert float(gres_metrics(pred, target)["Pr@0.7"]) == 100
    pred[..., 6:] = False
    assert float(gres_metrics(pred, target)["Pr@0.7"]) == 0


def test_default_target_flag_is_an_empty_mask(data):
    explicit = gres_metrics(data["pred"], data["target"], data["says_none"], ~data["target"].flatten(1).any(1))
    assert gres_metrics(data["pred"], data["target"], data["says_none"]) == explicit


def test_class_equals_function_and_state_is_sums(data):
    metric = GRESMetric()
    for start in range(0, 200, 7):
        part = slice(start, start + 7)
        metric.update(data["pred"][part], list(data["target"][part]), data["says_none"][part], data["is_none"][part])
    for name, want in gres_metrics(data["pred"], data["target"], data["says_none"], data["is_none"]).items():
        assert float(metric.compute()[name]) == pytest.approx(float(want), abs=1e-11)
    state = metric.metric_state
    assert [part.numel() for part in state.pop("sums").reshape(1, -1)] == [len(metric.columns)]
    assert all(sum(part.numel() for part in kept) == 0 for kept in state.values())
    metric.reset()
    assert not metric.sums.any()


def test_two_processes_summed_equal_one(data):
    """Adding the states of two metrics, as a synchronisation does, is the metric of both halves."""
    one, other, both = GRESMetric(), GRESMetric(), GRESMetric()
    for metric, part in ((one, slice(0, 90)), (other, slice(90, 200)), (both, slice(0, 200))):
        metric.update(data["pred"][part], data["target"][part], data["says_none"][part], data["is_none"][part])
    for name in one._defaults:
        setattr(one, name, getattr(one, name) + getattr(other, name))
    for name, want in both.compute().items():
        assert float(one.compute()[name]) == pytest.approx(float(want), abs=1e-11)


@st.composite
def expressions(draw):
    """Masks of different sizes with both flags, empty and full ones included."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        density = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
        pred = torch.rand(height, width, generator=generator) < density
        is_none = draw(st.booleans())
        target = torch.zeros_like(pred) if is_none else torch.rand(height, width, generator=generator) < 0.5
        rows.append((pred, target, draw(st.booleans()), is_none))
    return rows


def columns(rows):
    pred, target, says, none = zip(*rows, strict=True)
    return list(pred), list(target), torch.tensor(says), torch.tensor(none)


@given(expressions(), st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")
def test_order_and_batches_do_not_matter(rows, random):
    whole = gres_metrics(*columns(rows))
    shuffled = list(rows)
    random.shuffle(shuffled)
    metric = GRESMetric()
    while shuffled:
        size = random.randint(1, len(shuffled))
        metric.update(*columns(shuffled[:size]))
        shuffled = shuffled[size:]
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx(float(whole[name]), abs=1e-10, nan_ok=True)


@given(expressions())
@pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")
def test_against_the_truth_table_read_aloud(rows):
    ious, intersection, union = [], 0, 0
    for pred, target, says, none in rows:
        both, either = int((pred & target).sum()), int((pred | target).sum())
        if none:
            ious.append(1.0 if says else 0.0)
            union += 0 if says else either
        elif says:
            ious.append(0.0)
            union += either
        else:
            ious.append(both / either if either else 0.0)
            intersection, union = intersection + both, union + either
    got = gres_metrics(*columns(rows))
    assert float(got["gIoU"]) == pytest.approx(100 * sum(ious) / len(ious), abs=1e-10)
    assert float(got["cIoU"]) == pytest.approx(100 * intersection / union if union else float("nan"), abs=1e-10, nan_ok=True)


MASKS = torch.zeros(2, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MASKS, MASKS[:, :3]), ValueError, r"gres_metrics: `target` must be \(B, H, W\) with H=4, got \(2, 3, 4\)\."),
        ((MASKS.float(), MASKS), TypeError, r"gres_metrics: `pred` must be bool \(logits > 0, .*\), got torch\.float32\."),
        (([*MASKS], [MASKS[0]]), ValueError, r"`target` must be as many masks as `pred`, 2, got 1\."),
        (([MASKS[0]], [MASKS[0, :2]]), ValueError, r"`target\[0\]` must be \(H, W\) with H=4, got \(2, 4\)\."),
        ((MASKS, MASKS, torch.zeros(3, dtype=torch.bool)), ValueError, r"`pred_no_target` must be \(B,\) with B=2, got \(3,\)\."),
        ((MASKS, MASKS, torch.zeros(2)), TypeError, r"`pred_no_target` must be bool, got torch\.float32\."),
        ((MASKS, MASKS, None, [True, False]), TypeError, r"`target_no_target` must be a bool tensor, got list\."),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gres_metrics(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match="`no_target_rule` must be one of 'empty_mask', 'pixels', got 'fifty'"):
        GRESMetric(no_target_rule="fifty")
    with pytest.raises(ValueError, match="`min_pixels` must be at least 1, got 0"):
        gres_metrics(MASKS, MASKS, min_pixels=0)
