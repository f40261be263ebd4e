"""RRefCOCOMetric: means over groups, what a flag does under each protocol, and groups that lack a kind of sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.metrics import RRefCOCOMetric, rrefcoco_metrics

PIXELS = 12


def strip(length):
    return (torch.arange(PIXELS) < length)[None]


@st.composite
def groups(draw):
    """Rows of (group, exists, predicted pixels, true pixels, flag); every group has both kinds of sentence."""
    rows = []
    for group in range(draw(st.integers(1, 4))):
        for exists in (True, False):
            for _ in range(draw(st.integers(1, 3))):
                rows.append((group * 10, exists, draw(st.integers(0, PIXELS)), draw(st.integers(1, PIXELS)), draw(st.booleans())))
    return rows


def read_aloud(rows, protocol, flagged):
    cleared = protocol == "robust_ref_seg" and flagged
    ious, robust, rejected, both, either = [], [], [], 0, 0
    for group in sorted({row[0] for row in rows}):
        mine = [(exists, 0 if cleared and flag else pred, true, flag) for g, exists, pred, true, flag in rows if g == group]
        positive = [(min(pred, true), max(pred, true)) for exists, pred, true, _ in mine if exists]
        negative = [(pred, flag if flagged and not cleared else pred == 0) for exists, pred, _, flag in mine if not exists]
        shared, union = sum(i for i, _ in positive), sum(u for _, u in positive)
        ious.append(sum(i / u for i, u in positive) / len(positive))
        robust.append(shared / (union + sum(pred for pred, says in negative if not says)))
        rejected.append(sum(says for _, says in negative) / len(negative))
        both, either = both + shared, either + union
    means = [100 * sum(part) / len(part) for part in (ious, rejected, robust)]
    return {"mIoU": means[0], "oIoU": 100 * both / either, "mRR": means[1], "rIoU": means[2]}


def columns(rows):
    group, exists, pred, true, flags = zip(*rows, strict=True)
    masks = [torch.stack([strip(length) for length in lengths]) for lengths in (pred, true)]
    return (*masks, torch.tensor(exists), list(group)), torch.tensor(flags)


@given(groups(), st.sampled_from(["robust_ref_seg", "instancevg"]), st.booleans(), st.randoms(use_true_random=False))
def test_against_the_definition_in_any_order(rows, protocol, flagged, random):
    want = read_aloud(rows, protocol, flagged)
    arguments, flags = columns(rows)
    got = rrefcoco_metrics(*arguments, flags if flagged else None, protocol=protocol)
    assert {name: float(value) for name, value in got.items()} == pytest.approx(want, abs=1e-10)
    shuffled = list(rows)
    random.shuffle(shuffled)
    metric = RRefCOCOMetric(protocol=protocol)
    while shuffled:  # a group's sentences come in several batches
        part, shuffled = shuffled[:2], shuffled[2:]
        arguments, flags = columns(part)
        metric.update(*arguments, flags if flagged else None)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize(
    ("rows", "undefined", "reason"),
    [
        (
            [(0, True, 3, 3, False), (0, False, 0, 1, False), (1, True, 3, 3, False)],
            {"mRR"},
            "1 of 2 groups have no false sentence",
        ),
        (
            [(0, True, 3, 3, False), (0, False, 0, 1, False), (1, False, 3, 3, False)],
            {"mIoU"},
            "1 of 2 groups have no true sentence",
        ),
        (
            [(0, True, 0, 0, False), (0, False, 0, 1, False)],
            {"mIoU", "oIoU", "rIoU"},
            "1 of 1 groups have no predicted or true pixel",
        ),
    ],
)
def test_a_group_that_lacks_something_makes_the_mean_undefined(rows, undefined, reason):
    arguments, _ = columns(rows)
    with pytest.warns(UserWarning, match=reason) as caught:
        got = rrefcoco_metrics(*arguments)
    assert len(caught) == 1
    assert {name for name, value in got.items() if value.isnan()} == undefined


def test_a_false_sentence_with_an_empty_mask_under_both_protocols():
    rows = [(0, True, 4, 4, False), (0, False, 0, 4, False)]
    arguments, flags = columns(rows)
    assert float(rrefcoco_metrics(*arguments, flags)["mRR"]) == 100
    assert float(rrefcoco_metrics(*arguments, flags, protocol="instancevg")["mRR"]) == 0


def test_group_numbers_are_not_rounded():
    one, other = 2**60, 2**60 + 1  # the same float64
    rows = [(one, True, 4, 4, False), (one, True, 4, 4, False), (one, False, 0, 1, False)]
    rows += [(other, True, 2, 4, False), (other, False, 0, 1, False)]
    arguments, _ = columns(rows)
    got = rrefcoco_metrics(*arguments, per_sample=True)
    assert float(got["mIoU"]) == 75
    assert got["group"].tolist() == [row[0] for row in rows]


def test_bad_input():
    masks = torch.ones(2, 1, 3, dtype=torch.bool)
    exists = torch.tensor([True, False])
    with pytest.raises(TypeError, match=r"`exists` must be a bool tensor, got NoneType\."):
        rrefcoco_metrics(masks, masks, None, [0, 0])
    with pytest.raises(TypeError, match=r"`exists` must be bool, got torch\.float32\."):
        rrefcoco_metrics(masks, masks, exists.float(), [0, 0])
    with pytest.raises(ValueError, match=r"`group` must be \(B,\) with B=2, got \(3,\)\."):
        RRefCOCOMetric().update(masks, masks, exists, [0, 0, 1])
    with pytest.raises(TypeError, match=r"`group` must be integers, got float\."):
        rrefcoco_metrics(masks, masks, exists, [0.5, 1])
    with pytest.raises(ValueError, match="`protocol` must be one of 'robust_ref_seg', 'instancevg', got 'rrs'"):
        RRefCOCOMetric(protocol="rrs")
