"""RefZOMMetric: which expressions enter which number, and who says "nothing"."""

from __future__ import annotations

import pytest
import torch

from gresbox.metrics import RefZOMMetric, refzom_metrics, res_metrics

FULL, EMPTY = torch.ones(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)
HALF = FULL.clone()
HALF[2:] = False


def values(result):
    return {name: float(value) for name, value in result.items() if value.ndim == 0}


def test_zero_expressions_enter_the_accuracy_only():
    pred, target = [HALF, FULL, EMPTY, HALF], [FULL, FULL, EMPTY, EMPTY]
    got = refzom_metrics(pred, target, ["one", "many", "zero", "zero"], per_sample=True)
    want = values(res_metrics(pred[:2], target[:2]))
    assert {name: values(got)[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert float(got["Acc"]) == 50
    assert (float(got["mIoU_one"]), float(got["oIoU_many"])) == (50, 100)
    assert got["kind"].tolist() == [0, 1, 2, 2]
    assert got["iou"].isnan().tolist() == [False, False, True, True]


def test_the_mask_of_a_zero_expression_is_not_looked_at():
    kind = ["one", "many", "zero"]
    for pred, accuracy in ((FULL, 0), (EMPTY, 100)):
        first, second = (refzom_metrics([HALF, FULL, pred], [FULL, FULL, mask], kind) for mask in (FULL, EMPTY))
        assert values(first) == values(second)
        assert float(first["Acc"]) == accuracy
        assert float(first["Pr@0.9"]) == 50
    with pytest.warns(UserWarning, match="because no expression is of kind 'one' or 'many'"):
        assert refzom_metrics([EMPTY], [FULL], ["zero"])["mIoU"].isnan()


def test_flags_decide_the_accuracy_and_leave_the_masks():
    pred, target, kind = [HALF, HALF], [FULL, EMPTY], ["one", "zero"]
    flags = torch.tensor([True, True])
    with pytest.warns(UserWarning, match="mIoU_many, oIoU_many would divide by zero .* of kind 'many'"):
        by_mask, by_flag = (refzom_metrics(pred, target, kind, given) for given in (None, flags))
    assert (float(by_mask["Acc"]), float(by_flag["Acc"])) == (0, 100)
    assert float(by_mask["mIoU"]) == float(by_flag["mIoU"]) == 50


def test_bad_input():
    with pytest.raises(ValueError, match=r"`kind` must be as many strings as `pred` masks, 2, got 1\."):
        RefZOMMetric().update([FULL, FULL], [FULL, FULL], ["one"])
    with pytest.raises(ValueError, match=r"`kind\[1\]` must be one of 'one', 'many', 'zero', got 'none'\."):
        refzom_metrics([FULL, FULL], [FULL, FULL], ["one", "none"])
    with pytest.raises(TypeError, match=r"`pred_no_target` must be bool, got torch\.int64\."):
        refzom_metrics([FULL], [FULL], ["one"], torch.ones(1, dtype=torch.int64))
