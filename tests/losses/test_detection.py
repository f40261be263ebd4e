from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

from gresbox.losses import DetectionLoss, query_class_loss
from gresbox.structures import GresTarget, InstancePrediction, PaddedTargets
from gresbox.testing import assert_matches_reference

UNWEIGHTED = {"cls": "class", "box": "bbox", "giou": "giou"}


def random_boxes(*shape):
    centre = torch.rand(*shape, 2, dtype=torch.float64) * 0.6 + 0.2
    return torch.cat([centre, torch.rand(*shape, 2, dtype=torch.float64) * 0.3 + 0.05], -1)


def target_of(boxes):
    return GresTarget(torch.zeros(len(boxes), 4, 4, dtype=torch.bool), boxes)


def as_step(score_logits, boxes):
    unread = torch.zeros(*score_logits.shape, 1)
    return InstancePrediction(score_logits, unread, torch.zeros(len(unread), 1, 1, 1), unread, unread, boxes=boxes)


def first_queries(targets, queries, steps):
    """Query j for target j, -1 beyond the queries and where there is no target."""
    most = max(len(target.boxes) for target in targets)
    rows = torch.full((len(targets), most), -1)
    for b, target in enumerate(targets):
        count = min(len(target.boxes), queries)
        rows[b, :count] = torch.arange(count)
    return rows.expand(steps, -1, -1)


def golden_case(arrays, case):
    at = {key[3:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"c{case}_")}
    targets = [target_of(at[f"tgt{b}"]) for b in range(len(at["sizes"]))]
    steps = [as_step(logits[..., 0] - logits[..., 1], boxes) for logits, boxes in zip(at["logits"], at["boxes"], strict=True)]
    most = int(at["sizes"].max())
    matches = torch.full((3, len(targets), most), -1)
    for layer in range(3):
        for b in range(len(targets)):
            matches[layer, b, at[f"L{layer}_dst{b}"]] = at[f"L{layer}_src{b}"]
    return at, steps, targets, matches


@pytest.mark.parametrize("case", range(3))
def test_losses_are_the_official_ones(golden, case):
    at, steps, targets, matches = golden_case(golden("igvg_detloss"), case)
    losses = DetectionLoss(aux_layers="official")(steps, targets, matches)
    for name, theirs in UNWEIGHTED.items():
        expected = sum(at[f"weighted_loss_{theirs}{suffix}"].item() for suffix in ("", "_0", "_1"))
        # The official overlap has 1e-6 in its denominators, 4e-4 of the smallest box here.
        assert losses[name].item() == pytest.approx(expected, rel=2e-4 if name == "giou" else 2e-6), name
    assert sum(losses.values()).item() == pytest.approx(at["total"].item(), rel=2e-4)


@pytest.mark.parametrize("case", range(3))
def test_uniform_weights_are_detrs(golden, case):
    at, steps, targets, matches = golden_case(golden("igvg_detloss"), case)
    for aux_layers, suffixes in {"uniform": ("", "_0", "_1"), "none": ("",)}.items():
        losses = DetectionLoss(aux_layers=aux_layers)(steps, targets, matches)
        for (name, theirs), weight in zip(UNWEIGHTED.items(), (1, 5, 2), strict=True):
            expected = weight * sum(at[f"raw_loss_{theirs}{suffix}"].item() for suffix in suffixes)
            assert losses[name].item() == pytest.approx(expected, rel=2e-4 if name == "giou" else 2e-6), name


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [6, 1], [4, 4]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_its_definition_and_gradients(counts, dtype):
    targets = [target_of(random_boxes(count)) for count in counts]
    matches = first_queries(targets, 4, 2)
    instances, matched = max(sum(counts), 1), sum(min(count, 4) for count in counts)

    def ours(logits, boxes):
        losses = DetectionLoss()([as_step(*layer) for layer in zip(logits, boxes, strict=True)], targets, matches)
        return losses["cls"], losses["box"], losses["giou"]

    def reference(logits, boxes):
        cls, box, giou = torch.zeros(3, dtype=torch.float64).unbind()
        box, giou = box + 0 * boxes.sum(), giou + 0 * boxes.sum()
        for layer in range(2):
            for b, target in enumerate(targets):
                count = min(counts[b], 4)
                label = (torch.arange(4) >= count).long()
                two = torch.stack([logits[layer, b], torch.zeros_like(logits[layer, b])], -1)
                weight = torch.where(label == 0, 1.0, 0.1).double()
                weight[label == 1] = 0.1
                loss = F.cross_entropy(two, label, reduction="none") * weight
                cls = cls + loss.sum() / (matched + 0.1 * (8 - matched))
                chosen, truth = boxes[layer, b, :count], target.boxes[:count]
                box = box + 5 * (chosen - truth).abs().sum() / instances
                corners = [box_convert(each, "cxcywh", "xyxy") for each in (chosen, truth)]
                giou = giou + 2 * generalized_box_iou_loss(*corners, eps=0.0).sum() / instances
        return cls, box, giou

    inputs = [torch.randn(2, 2, 4), random_boxes(2, 2, 4)]
    if dtype == torch.float32:
        targets = [target_of(target.boxes.float().double()) for target in targets]
    assert_matches_reference(ours, reference, inputs, dtype=dtype, tolerance=1e-9 if dtype == torch.float64 else None)


def test_query_class_loss_is_the_two_class_cross_entropy():
    logits, matched = torch.randn(3, 5, 2, dtype=torch.float64), torch.rand(3, 5) > 0.5
    expected = F.cross_entropy(
        logits.flatten(0, 1), (~matched).long().flatten(), torch.tensor([1.0, 0.3]).double(), reduction="none"
    )
    loss = query_class_loss(logits[..., 0] - logits[..., 1], matched, no_object=0.3)
    torch.testing.assert_close(loss.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_no_instances_have_zero_box_losses_and_zero_gradients():
    logits, boxes = torch.randn(2, 4, requires_grad=True), random_boxes(2, 4).float().requires_grad_()
    losses = DetectionLoss()([as_step(logits, boxes)], [target_of(torch.zeros(0, 4))] * 2, torch.zeros(1, 2, 0).long())
    sum(losses.values()).backward()
    assert losses["box"] == losses["giou"] == 0
    assert losses["cls"] > 0
    assert boxes.grad is not None
    assert not boxes.grad.any()
    assert logits.grad.abs().min() > 0


def test_without_a_class_for_unmatched_queries_an_empty_batch_is_zero_not_nan():
    step = as_step(torch.randn(2, 4), random_boxes(2, 4))
    losses = DetectionLoss(no_object=0.0)([step], [target_of(torch.zeros(0, 4))] * 2, torch.zeros(1, 2, 0).long())
    assert all(loss == 0 for loss in losses.values())


def test_the_normaliser_is_given():
    targets = [target_of(random_boxes(2)), target_of(random_boxes(1))]
    steps, matches = [as_step(torch.randn(2, 4), random_boxes(2, 4))], first_queries(targets, 4, 1)
    own, double = (DetectionLoss()(steps, targets, matches, num_instances=number) for number in (None, torch.tensor(6.0)))
    for name in ("box", "giou"):
        torch.testing.assert_close(own[name], 2 * double[name])
    assert own["cls"].item() == pytest.approx(double["cls"].item() * (6 + 0.1 * 2) / (3 + 0.1 * 5), rel=1e-5)


def test_boxes_without_area_and_outside_are_finite():
    boxes = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [1.5, -0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.0]]], requires_grad=True)
    targets = [target_of(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]))]
    losses = DetectionLoss()([as_step(torch.zeros(1, 3), boxes)], targets, torch.tensor([[[0, 1, 2]]]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, m: ([replace(s[0], boxes=None)], t, m), r"`boxes` of step 0 must be there, got None\."),
        (lambda s, t, m: (s, t, m[0]), r"`matches` must be \(S, B, M\), got \(2, 2\)\."),
        (lambda s, t, m: (s, t, m.expand(3, -1, -1)), r"`matches` must be \(S, B, M\) with S=1, got \(3, 2, 2\)\."),
        (lambda s, t, m: (s, t[:1], m), r"`targets` must be one per image with B=2, got 1\."),
        (lambda s, t, m: ([replace(s[0], boxes=torch.rand(2, 3, 4))], t, m), r"`boxes` must be \(S, B, N, 4\) with N=4, got"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    targets = [target_of(random_boxes(2)), target_of(random_boxes(1))]
    steps = [as_step(torch.randn(2, 4), random_boxes(2, 4))]
    with pytest.raises(ValueError, match=f"^DetectionLoss: {message}"):
        DetectionLoss()(*change(steps, targets, first_queries(targets, 4, 1)))


def test_padded_targets_have_no_boxes():
    step = as_step(torch.randn(1, 4), random_boxes(1, 4))
    with pytest.raises(
        TypeError, match=r"^DetectionLoss: `targets` must be a list of GresTarget, because boxes are read, got Padded"
    ):
        DetectionLoss()([step], PaddedTargets.pack([target_of(random_boxes(2))], 3), torch.zeros(1, 1, 3).long())


@pytest.mark.parametrize("option", [{"cls": -1.0}, {"no_object": -0.1}, {"aux_layers": "all"}])
def test_wrong_options_are_errors(option):
    with pytest.raises(ValueError, match=f"^DetectionLoss: `{next(iter(option))}` must be"):
        DetectionLoss(**option)


def test_wrong_flags_are_an_error():
    with pytest.raises(ValueError, match=r"^query_class_loss: `matched` must be \(2, 4\) like `score_logits`, got \(2, 3\)\."):
        query_class_loss(torch.zeros(2, 4), torch.zeros(2, 3).bool())
    with pytest.raises(TypeError, match=r"^query_class_loss: `score_logits` must be a floating-point"):
        query_class_loss(torch.zeros(2, 4).long(), torch.zeros(2, 4).bool())
