"""GRECMetric against its rule read aloud: which boxes are kept, which pairs are matched, what counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.metrics import GRECMetric, grec_metrics
from gresbox.metrics.grec import _count_matches, _gathered, _Rule
from gresbox.ops import box_iou, generalized_box_iou

BOX = torch.tensor([[0.0, 0.0, 4.0, 4.0]])


def answer(boxes, scores):
    return {"boxes_xyxy": torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4), "scores": torch.as_tensor(scores)}


def read_aloud(found, true, rule):
    """Kept, matched, F1: pair by pair, with Python's own sort and maximum."""
    ranked = sorted(zip(found["scores"].tolist(), found["boxes_xyxy"].tolist(), strict=True), reverse=True)
    kept = torch.tensor([box for score, box in ranked if score >= rule.score_threshold]).reshape(-1, 4)
    overlap = (generalized_box_iou if rule.iou_type == "giou" else box_iou)(kept, true).tolist()
    free = {(row, column) for row in range(len(kept)) for column in range(len(true))}
    matched = 0
    while free:
        row, column = max(sorted(free), key=lambda pair: overlap[pair[0]][pair[1]])
        if overlap[row][column] < rule.overlap_threshold:
            break
        matched += 1
        free = {pair for pair in free if pair[0] != row and pair[1] != column}
    if len(true) == 0:
        return len(kept), 0, float(len(kept) == 0)
    return len(kept), matched, 2 * matched / (len(kept) + len(true))


@st.composite
def expressions(draw):
    """Boxes on a coarse grid, so that equal boxes, equal overlaps, equal scores and boxes without area are common."""
    corner = st.integers(0, 4)

    def boxes(most):
        drawn = draw(st.lists(st.tuples(corner, corner, corner, corner), max_size=most))
        return torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in drawn], dtype=torch.float32).reshape(
            -1, 4
        )

    rows = []
    for _ in range(draw(st.integers(1, 5))):
        found = boxes(6)
        scores = draw(st.lists(st.sampled_from([0.1, 0.7, 0.8, 0.9]), min_size=len(found), max_size=len(found)))
        rows.append(({"boxes_xyxy": found, "scores": torch.tensor(scores, dtype=torch.float64)}, boxes(4)))
    return rows


@given(expressions(), st.sampled_from(["giou", "iou"]), st.sampled_from([0.3, 0.5, 0.75]))
@pytest.mark.filterwarnings("ignore:.*divide by zero:UserWarning")
def test_against_the_rule_read_aloud(rows, iou_type, overlap_threshold):
    found, true = (list(column) for column in zip(*rows, strict=True))
    options = {"iou_type": iou_type, "overlap_threshold": overlap_threshold}
    got = grec_metrics(found, true, per_sample=True, **options)
    want = [read_aloud(one, other, _Rule(0.7, iou_type, overlap_threshold)) for one, other in rows]
    numbers = torch.stack([got[name].double() for name in ("kept", "matched", "f1")], 1)
    torch.testing.assert_close(numbers, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(got["F1"]) == pytest.approx(100 * sum(f1 == 1 for *_, f1 in want) / len(want), abs=1e-10)
    assert torch.equal(grec_metrics(found, true, **options)["F1"], got["F1"])  # without looking at every expression


def test_ties_go_to_the_higher_score_then_to_the_larger_coordinates():
    """Both boxes overlap the first target equally; only the right one could have the second target instead."""
    true = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0]])
    right, left = [2.0, 0.0, 12.0, 10.0], [-2.0, 0.0, 8.0, 10.0]
    for boxes, scores, matched in [
        ([right, left], [0.8, 0.9], 2),
        ([left, right], [0.9, 0.8], 2),
        ([right, left], [0.9, 0.8], 1),
        ([left, right], [0.8, 0.9], 1),
        ([left, right], [0.9, 0.9], 1),
        ([right, left], [0.9, 0.9], 1),
    ]:
        got = grec_metrics([answer(boxes, scores)] * 2, [true] * 2, protocol="instancevg", per_sample=True)
        assert got["matched"].tolist() == [matched] * 2
        assert read_aloud(answer(boxes, scores), true, _Rule(0.7, "giou", 0.5))[1] == matched


def test_many_boxes_are_matched_in_parts():
    """More pairs than are treated at once, of expressions with different numbers of boxes."""
    generator = np.random.default_rng(0)
    rows = []
    for n, m in ((150, 140), (3, 2), (130, 130), (0, 5), (90, 100)):
        low = generator.uniform(0, 50, (max(n, m), 2))
        boxes = torch.from_numpy(np.concatenate([low, low + generator.uniform(5, 30, (max(n, m), 2))], 1)).float()
        moved = boxes + torch.from_numpy(generator.normal(0, 1, (max(n, m), 1))).float()
        rows.append((answer(moved[:n], torch.from_numpy(generator.uniform(0.5, 1, n))), boxes[:m]))
    found, true = (list(column) for column in zip(*rows, strict=True))
    got = grec_metrics(found, true, protocol="instancevg", per_sample=True)
    want = [read_aloud(one, other, _Rule(0.7, "giou", 0.5))[:2] for one, other in rows]
    assert list(zip(got["kept"].tolist(), got["matched"].tolist(), strict=True)) == want
    assert max(matched for _, matched in want) > 20


def test_a_score_at_the_threshold_is_kept_in_float64():
    for dtype, kept in ((torch.float64, 1), (torch.float32, 0)):  # a float32 0.7 is below 0.7
        found = answer(BOX, torch.tensor([0.7], dtype=dtype))
        assert int(grec_metrics([found], [BOX], protocol="instancevg", per_sample=True)["kept"]) == kept
    found = answer(BOX, torch.tensor([0.7], dtype=torch.float32))
    assert int(grec_metrics([found], [BOX], protocol="instancevg", score_threshold=0.6999, per_sample=True)["kept"]) == 1


def test_generalised_iou_and_iou_differ():
    moved = BOX + torch.tensor([0.0, 0.0, 3.0, 2.5])  # IoU 0.35; and one whose hull is much larger
    skewed = torch.tensor([[1.0, 1.0, 5.0, 5.0]])
    assert float(box_iou(BOX, skewed)) > float(generalized_box_iou(BOX, skewed))
    level = float(box_iou(BOX, skewed)) - 1e-3
    for iou_type, matched in (("iou", 1), ("giou", 0)):
        found = answer(skewed, [0.9])
        got = grec_metrics([found], [BOX], iou_type=iou_type, overlap_threshold=level, protocol="instancevg", per_sample=True)
        assert int(got["matched"]) == matched
    assert float(box_iou(BOX, moved)) < 0.5


def test_where_nothing_can_be_counted():
    empty = answer(torch.zeros(0, 4), torch.zeros(0))
    some = answer(BOX, [0.9])
    with pytest.warns(UserWarning, match="T_acc would divide by zero and are NaN, because no expression has a target"):
        got = grec_metrics([empty, some], [BOX[:0], BOX[:0]])
    assert (float(got["F1"]), float(got["N_acc"])) == (50, 50)
    with pytest.warns(UserWarning, match="N_acc would divide by zero and are NaN, because every expression has a target"):
        got = grec_metrics([empty, some], [BOX, BOX])
    assert (float(got["F1"]), float(got["T_acc"])) == (50, 50)
    got = grec_metrics([some], [BOX], protocol="instancevg")
    assert {name: float(value) for name, value in got.items()} == {"F1": 100, "N_acc": 0, "T_acc": 100}


def test_the_flag_overrules_the_boxes():
    """The benchmark's file has one box of zeros where there is no target; a target may have lost its boxes."""
    none = torch.tensor([True, False])
    got = grec_metrics([answer(BOX, [0.1]), answer(BOX, [0.9])], [torch.zeros(1, 4), BOX[:0]], none, per_sample=True)
    assert got["f1"].tolist() == [1, 0]
    assert (float(got["N_acc"]), float(got["T_acc"])) == (100, 100)
    got = grec_metrics([answer(BOX, [0.9])] * 2, [BOX, BOX], none, per_sample=True)
    assert (got["matched"].tolist(), got["f1"].tolist()) == ([0, 1], [0, 1])


def test_half_precision_is_compared_in_float32_and_devices_and_gradients_do_not_matter():
    found = {"boxes_xyxy": BOX.half().requires_grad_(), "scores": torch.tensor([0.9]).half().requires_grad_()}
    assert float(grec_metrics([found], [BOX.bfloat16()], protocol="instancevg")["F1"]) == 100
    kept, scores, true = _gathered("f", [found], [BOX.double()], 0.7)
    assert kept.xyxy.dtype == np.float64
    assert _count_matches(kept, scores, true, [0], _Rule(0.7, "giou", 0.5)) == [1]


@pytest.mark.parametrize(
    ("found", "true", "options", "error", "message"),
    [
        (
            [answer(BOX, [float("nan")])],
            [BOX],
            {},
            ValueError,
            r"grec_metrics: `scores` must be numbers, got 1 of 1 that are not\.",
        ),
        ([answer(BOX, [0.9])], [BOX, BOX], {}, ValueError, r"`targets` must be as many tensors as `predictions`, 1, got 2\."),
        (
            [answer(BOX, [0.9, 0.8])],
            [BOX],
            {},
            ValueError,
            r"`predictions\[0\]\['boxes_xyxy'\]` must be \(N, 4\) with N=2, got \(1, 4\)",
        ),
        (
            [{"boxes": BOX}],
            [BOX],
            {},
            TypeError,
            r"`predictions\[0\]` must be a dict with boxes_xyxy and scores, got one with boxes\.",
        ),
        ([BOX], [BOX], {}, TypeError, r"`predictions\[0\]` must be a dict with boxes_xyxy and scores, got Tensor\."),
        ([answer(BOX, [0.9])], [BOX[0]], {}, ValueError, r"`targets\[0\]` must be \(M, 4\), got \(4,\)\."),
        ([answer(BOX, [0.9])], [BOX.long()], {}, TypeError, r"`targets\[0\]` must be a floating-point tensor, got torch\.int64\."),
        ([answer(BOX.flip(1), [0.9])], [BOX], {}, ValueError, r"boxes of `predictions` must be finite xyxy with x1 <= x2"),
        ([answer(BOX, [0.9])], [BOX * float("inf")], {}, ValueError, r"boxes of `targets` must be finite xyxy with x1 <= x2"),
        ([answer(BOX, [0.9])], [BOX], {"iou_type": "diou"}, ValueError, r"`iou_type` must be one of 'giou', 'iou', got 'diou'\."),
        ([answer(BOX, [0.9])], [BOX], {"overlap_threshold": 2}, ValueError, r"`overlap_threshold` must be in \[-1, 1\], got 2\."),
        ([answer(BOX, [0.9])], [BOX], {"protocol": "mdetr"}, ValueError, r"`protocol` must be one of 'grefcoco', 'instancevg'"),
    ],
)
def test_bad_input(found, true, options, error, message):
    with pytest.raises(error, match=message) as caught:
        grec_metrics(found, true, **options)
    assert "\n" not in str(caught.value)


def test_a_bad_box_that_is_not_kept_is_not_looked_at():
    found = {"boxes_xyxy": torch.tensor([[4.0, 0.0, 0.0, 4.0], [0.0, 0.0, 4.0, 4.0]]), "scores": torch.tensor([0.1, 0.9])}
    assert float(grec_metrics([found], [BOX], protocol="instancevg")["F1"]) == 100


def test_class_options():
    metric = GRECMetric(0.5, "iou")
    metric.update([answer(BOX, [0.6])], [BOX])
    metric.update([answer(BOX, [0.6])], [BOX[:0]])
    assert {name: float(value) for name, value in metric.compute().items()} == {"F1": 50, "N_acc": 0, "T_acc": 100}
