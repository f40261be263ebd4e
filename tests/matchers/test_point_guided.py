import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.matchers import PointGuidedMatcher, point_guided
from gresbox.structures import GresTarget, InstancePrediction, PaddedTargets

WEIGHTS = ("cls", "box", "giou", "point")


def random_boxes(*shape, dtype=torch.float64):
    centre = torch.rand(*shape, 2, dtype=dtype) * 0.6 + 0.2
    return torch.cat([centre, torch.rand(*shape, 2, dtype=dtype) * 0.3 + 0.05], -1)


def target_of(boxes):
    return GresTarget(torch.zeros(len(boxes), 4, 4, dtype=torch.bool), boxes)


def random_targets(counts):
    return [target_of(random_boxes(count)) for count in counts]


def random_inputs(batch=2, queries=6, dtype=torch.float64):
    logits = torch.randn(batch, queries, 2, dtype=dtype)
    return logits, random_boxes(batch, queries, dtype=dtype), torch.rand(batch, queries, 2, dtype=dtype)


def as_step(logits, boxes, points):
    """The same prediction as a decoder step; masks, queries and words are not read."""
    unread = torch.zeros(*logits.shape[:2], 1)
    return InstancePrediction(
        logits[..., 0] - logits[..., 1], unread, torch.zeros(len(logits), 1, 1, 1), unread, unread, boxes=boxes, points=points
    )


def random_steps(steps=3, batch=2, queries=6, dtype=torch.float64):
    points = torch.rand(batch, queries, 2, dtype=dtype)
    return [as_step(*random_inputs(batch, queries, dtype)[:2], points) for _ in range(steps)]


def reference_cost(logits, boxes, points, targets, *, cls=1.0, box=5.0, giou=2.0, point=2.0, eps=0.0):
    """Pair by pair, for one image; ``eps`` is the official code's."""
    cost = torch.zeros(len(boxes), len(targets), dtype=boxes.dtype)
    for i, j in itertools.product(range(len(boxes)), range(len(targets))):
        (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[i].tolist(), targets[j].tolist()
        width = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
        height = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
        overlap = max(width, 0) * max(height, 0)
        union = aw * ah + bw * bh - overlap
        around = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) * (
            max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
        )
        cost[i, j] = -cls * logits[i].softmax(-1)[0] + box * (boxes[i] - targets[j]).abs().sum()
        cost[i, j] -= giou * (overlap / (union + eps) - (around - union) / (around + eps))
        if points is not None:
            cost[i, j] += point * (points[i] - targets[j][:2]).abs().sum()
    return cost


@pytest.fixture
def seen_costs(monkeypatch):
    """What the matcher hands to ``assign``, call by call."""
    costs, real = [], point_guided.assign

    def spy(cost, *args, **kwargs):
        costs.append(cost.clone())
        return real(cost, *args, **kwargs)

    monkeypatch.setattr(point_guided, "assign", spy)
    return costs


def golden_case(arrays, case):
    at = {key[3:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"c{case}_")}
    targets = [target_of(at[f"tgt{b}"]) for b in range(len(at["sizes"]))]
    weights = dict(zip(WEIGHTS, at["weights_cls_l1_giou_point"].tolist(), strict=True))
    return at, targets, weights, at["points"] if at["use_points"] else None


@pytest.mark.parametrize("case", range(4))
def test_matching_and_costs_are_the_official_ones(golden, seen_costs, case):
    at, targets, weights, points = golden_case(golden("igvg_matcher"), case)
    pairs = PointGuidedMatcher(**weights)(at["logits"], at["boxes"], points, targets)
    for b, (queries, instances) in enumerate(pairs):
        by_target = at[f"dst{b}"].argsort()
        assert instances.tolist() == at[f"dst{b}"][by_target].tolist()
        assert queries.tolist() == at[f"src{b}"][by_target].tolist()
        # The official overlap has 1e-6 in its denominators: 4e-4 of the smallest box here, times the overlap's weight 2.
        cost = seen_costs[0][b, :, : len(targets[b].boxes)]
        torch.testing.assert_close(cost, at[f"cost{b}"], rtol=0, atol=1e-3)
        image = (at["logits"][b], at["boxes"][b], None if points is None else points[b], targets[b].boxes)
        torch.testing.assert_close(reference_cost(*image, **weights, eps=1e-6), at[f"cost{b}"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cost, reference_cost(*image, **weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(3))
def test_layers_are_matched_as_officially(golden, case):
    at = {key[3:]: torch.from_numpy(value) for key, value in golden("igvg_detloss").items() if key.startswith(f"c{case}_")}
    targets = [target_of(at[f"tgt{b}"]) for b in range(len(at["sizes"]))]
    steps = [as_step(at["logits"][layer], at["boxes"][layer], at["points"]) for layer in range(3)]
    matches = PointGuidedMatcher().match_steps(steps, targets)
    for layer, b in itertools.product(range(3), range(len(targets))):
        expected = torch.full((len(targets[b].boxes),), -1)
        expected[at[f"L{layer}_dst{b}"]] = at[f"L{layer}_src{b}"]
        assert matches[layer, b, : len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_term_alone_is_its_definition(seen_costs, name):
    logits, boxes, points = random_inputs()
    targets = random_targets([3, 3])
    PointGuidedMatcher(**{**dict.fromkeys(WEIGHTS, 0.0), name: 1.0})(logits, boxes, points, targets)
    for b in range(2):
        only = {**dict.fromkeys(WEIGHTS, 0.0), name: 1.0}
        torch.testing.assert_close(seen_costs[0][b], reference_cost(logits[b], boxes[b], points[b], targets[b].boxes, **only))


def test_the_printed_class_cost(seen_costs):
    logits, boxes, points = random_inputs()
    off = {"box": 0.0, "giou": 0.0, "point": 0.0}
    PointGuidedMatcher(**off, class_cost="cross_entropy")(logits, boxes, points, random_targets([2, 2]))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.zeros(12, dtype=torch.int64), reduction="none").view(2, 6, 1)
    torch.testing.assert_close(seen_costs[0], expected.expand(-1, -1, 2))


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 5))
def test_equals_brute_force(seed, queries, count):
    torch.manual_seed(seed)
    logits, boxes, points = random_inputs(1, queries)
    (target,) = random_targets([count])
    cost = reference_cost(logits[0], boxes[0], points[0], target.boxes)
    ((rows, columns),) = PointGuidedMatcher()(logits, boxes, points, [target])
    assert len(rows) == len(set(rows.tolist())) == min(queries, count)
    assert columns.tolist() == sorted(set(columns.tolist()))
    few, many = sorted((queries, count))
    table = cost if queries <= count else cost.T
    best = min(sum(table[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(many), few))
    assert cost[rows, columns].sum().item() == pytest.approx(best, abs=1e-9)


@given(st.integers(0, 10_000), st.permutations(range(6)), st.permutations(range(4)))
def test_permutations_permute_the_match(seed, queries, instances):
    torch.manual_seed(seed)
    inputs, (target,) = random_inputs(1), random_targets([4])
    ((rows, _),) = PointGuidedMatcher()(*inputs, [target])
    ((moved, _),) = PointGuidedMatcher()(*(value[:, queries] for value in inputs), [target])
    assert [queries[row] for row in moved.tolist()] == rows.tolist()
    ((moved, _),) = PointGuidedMatcher()(*inputs, [target_of(target.boxes[instances])])
    assert moved.tolist() == rows[instances].tolist()


@given(st.integers(0, 10_000), st.lists(st.integers(0, 8), min_size=3, max_size=3))
@settings(max_examples=15)
def test_images_and_steps_together_are_each_alone(seed, counts):
    torch.manual_seed(seed)
    steps, targets = random_steps(batch=3), random_targets(counts)
    together = PointGuidedMatcher().match_steps(steps, targets)
    assert together.shape == (3, 3, max(counts))
    for s, b in itertools.product(range(3), range(3)):
        part = as_step(torch.stack([steps[s].score_logits, torch.zeros(3, 6)], -1), steps[s].boxes, steps[s].points)
        part = replace(part, **{name: getattr(part, name)[b : b + 1] for name in ("score_logits", "boxes", "points")})
        alone = PointGuidedMatcher().match_steps([part], targets[b : b + 1])
        assert together[s, b, : counts[b]].tolist() == alone[0, 0].tolist()
        assert (together[s, b, : counts[b]] >= 0).sum() == min(counts[b], 6)
        assert (together[s, b, counts[b] :] == -1).all()


def test_forward_and_match_steps_agree():
    inputs, targets = random_inputs(3, 4), random_targets([2, 0, 7])
    matches = PointGuidedMatcher().match_steps([as_step(*inputs)], targets)[0]
    for b, (rows, columns) in enumerate(PointGuidedMatcher()(*inputs, targets)):
        assert rows.dtype == columns.dtype == torch.int64
        assert matches[b, columns].tolist() == rows.tolist()
        assert len(columns) == min(4, len(targets[b].boxes))


def test_points_decide_between_equal_boxes():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 2])
    points = torch.tensor([[[0.1, 0.9], [0.5, 0.45]]])
    target = target_of(boxes[0, :1])
    logits = torch.zeros(1, 2, 2)
    assert PointGuidedMatcher()(logits, boxes, points, [target])[0][0].tolist() == [1]
    assert PointGuidedMatcher()(logits, boxes, points.flip(1), [target])[0][0].tolist() == [0]
    assert PointGuidedMatcher(point=0.0)(logits, boxes, points, [target])[0][0].tolist() == [0]
    assert PointGuidedMatcher()(logits, boxes, None, [target])[0][0].tolist() == [0]


def test_one_assignment_serves_all_steps_and_images(seen_costs):
    PointGuidedMatcher().match_steps(random_steps(steps=4, batch=3), random_targets([2, 0, 3]))
    assert len(seen_costs) == 1
    assert seen_costs[0].shape == (12, 6, 3)
    assert not seen_costs[0].requires_grad


def test_nothing_to_match_asks_nobody(seen_costs):
    matches = PointGuidedMatcher().match_steps(random_steps(), random_targets([0, 0]))
    assert matches.shape == (3, 2, 0)
    assert matches.dtype == torch.int64
    assert not seen_costs
    pairs = PointGuidedMatcher()(*random_inputs(), random_targets([0, 0]))
    assert [rows.shape for rows, _ in pairs] == [(0,), (0,)]


def test_no_gradient_and_no_autocast(seen_costs):
    logits, boxes, points = random_inputs(dtype=torch.float32)
    targets = random_targets([2, 1])
    PointGuidedMatcher()(logits.requires_grad_(), boxes.requires_grad_(), points, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        PointGuidedMatcher()(logits, boxes, points, targets)
    assert torch.equal(*seen_costs)
    assert not seen_costs[0].requires_grad
    half = [value.detach().bfloat16() for value in (logits, boxes, points)]
    PointGuidedMatcher()(*half, targets)
    PointGuidedMatcher()(*(value.float() for value in half), targets)
    assert seen_costs[2].dtype == torch.float32
    torch.testing.assert_close(*seen_costs[2:], rtol=1e-2, atol=1e-2)  # the class logits' difference is taken in their dtype


def test_boxes_without_area_are_matched(seen_costs):
    logits, boxes, points = random_inputs()
    boxes[0, 0, 2:] = 0
    flat = random_boxes(3)
    flat[0, 2:], flat[1, 2] = 0, 0
    empty_mask = GresTarget(torch.zeros(1, 4, 4, dtype=torch.bool))  # its box is 0, 0, 0, 0
    pairs = PointGuidedMatcher()(logits, boxes, points, [target_of(flat), empty_mask])
    assert [len(rows) for rows, _ in pairs] == [3, 1]
    assert seen_costs[0].isfinite().all()


@pytest.mark.parametrize(
    "wrong", [[200.0, 120.0, 64.0, 80.0], [0.5, -0.2, 0.1, 0.1], [0.5, 0.5, -0.1, 0.1], [0.5, 0.5, torch.nan, 0.1]]
)
def test_target_boxes_outside_the_image_are_an_error(wrong):
    targets = random_targets([2, 2])
    targets[1].boxes[0] = torch.tensor(wrong)
    expected = (
        r"^PointGuidedMatcher: `targets` must have cxcywh boxes in \[0, 1\], got others in image 1; divide boxes in pixels by"
    )
    with pytest.raises(ValueError, match=expected):
        PointGuidedMatcher()(*random_inputs(), targets)


def test_rounding_at_the_border_is_no_error():
    targets = [target_of(torch.tensor([[0.5, 0.5, 1 + 1e-6, 1.0], [-1e-6, 0.5, 0.1, 0.1]]))]
    assert len(PointGuidedMatcher()(*random_inputs(1), targets)[0][0]) == 2


def test_predicted_boxes_outside_the_image_are_priced_as_they_are():
    logits, boxes, points = random_inputs()
    targets = random_targets([2, 2])
    expected = PointGuidedMatcher()(logits[:, :5], boxes[:, :5], points[:, :5], targets)
    boxes[:, 5] = torch.tensor([40.0, -3.0, 5.0, 5.0])
    for ours, theirs in zip(PointGuidedMatcher()(logits, boxes, points, targets), expected, strict=True):
        assert ours[0].tolist() == theirs[0].tolist()  # far away: never the cheapest


@pytest.mark.parametrize("name", ["logits", "boxes", "points"])
def test_a_nan_cost_names_its_source(name):
    inputs = dict(zip(("logits", "boxes", "points"), random_inputs(), strict=True))
    inputs[name][1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"^PointGuidedMatcher: `{name}` must be finite because the cost reads them, got NaN"):
        PointGuidedMatcher()(**inputs, targets=random_targets([1, 2]))


@pytest.mark.parametrize("name", ["boxes", "points"])
def test_an_infinite_cost_is_taken_last(name):
    inputs = dict(zip(("logits", "boxes", "points"), random_inputs(), strict=True))
    inputs[name][1, 2] = torch.inf
    ((_, _), (rows, _)) = PointGuidedMatcher()(**inputs, targets=random_targets([1, 5]))
    assert sorted(rows.tolist()) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("name", ["score_logits", "boxes", "points"])
def test_a_nan_cost_names_its_step(name):
    steps = random_steps()
    steps[2] = replace(steps[2], **{name: torch.full_like(getattr(steps[2], name), torch.nan)})
    with pytest.raises(ValueError, match=f"^PointGuidedMatcher: `{name}` of step 2 must be finite"):
        PointGuidedMatcher().match_steps(steps, random_targets([1, 2]))


def test_nan_can_count_as_large():
    logits, boxes, points = random_inputs()
    targets = random_targets([1, 6])
    expected = PointGuidedMatcher(nan="large")(logits, boxes, points, targets)
    boxes[0, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN"):
        pairs = PointGuidedMatcher(nan="large")(logits, boxes, points, targets)
    assert pairs[0][0].item() != 3
    assert pairs[1][0].tolist() == expected[1][0].tolist()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, {"logits": torch.zeros(2, 6)}, r"`logits` must be \(B, N, 2\), got \(2, 6\)\."),
        (ValueError, {"logits": torch.zeros(2, 6, 3)}, r"`logits` must be \(B, N, 2\), got \(2, 6, 3\)\."),
        (ValueError, {"boxes": torch.zeros(2, 5, 4)}, r"`boxes` must be \(B, N, 4\) with N=6, got \(2, 5, 4\)\."),
        (ValueError, {"points": torch.zeros(2, 6, 3)}, r"`points` must be \(B, N, 2\), got \(2, 6, 3\)\."),
        (
            TypeError,
            {"logits": torch.zeros(2, 6, 2, dtype=torch.int64)},
            r"`logits` must be a floating-point tensor, got torch\.int64",
        ),
        (TypeError, {"targets": [torch.rand(1, 4), torch.rand(2, 4)]}, r"`targets` must be a list of GresTarget, got Tensor\."),
        (
            TypeError,
            {"targets": PaddedTargets.pack([GresTarget(torch.ones(1, 4, 4).bool())] * 2, 2)},
            r"`targets` must be a list of GresTarget, because boxes are read, got PaddedTargets\.",
        ),
        (ValueError, {"targets": random_targets([1])}, r"`targets` must be one per image with B=2, got 1\."),
        (ValueError, {"targets": [target.to("meta") for target in random_targets([1, 1])]}, r"must be on cpu like the prediction"),
    ],
)
def test_wrong_input_is_one_clear_line(kind, change, message):
    inputs = dict(zip(("logits", "boxes", "points"), random_inputs(), strict=True))
    with pytest.raises(
        kind, match=f"^PointGuidedMatcher: .*{message}" if "meta" in str(change) else f"^PointGuidedMatcher: {message}"
    ):
        PointGuidedMatcher()(**{**inputs, "targets": random_targets([1, 2]), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], r"`predictions` must be at least one decoder step, got none\."),
        (lambda s: [s[0], replace(s[1], boxes=None)], r"`boxes` of step 1 must be there, got None\."),
        (lambda s: [s[0], replace(s[1], points=None)], r"`points` must be there in all steps or in none"),
        (lambda s: [s[0], *random_steps(1, queries=5)], r"`score_logits of step 1` must be \(B, N\) with N=6, got \(2, 5\)\."),
    ],
)
def test_wrong_steps_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=f"^PointGuidedMatcher: {message}"):
        PointGuidedMatcher().match_steps(change(random_steps()), random_targets([1, 2]))


@pytest.mark.parametrize("option", [{"cls": -1.0}, {"point": float("nan")}, {"class_cost": "focal"}, {"nan": "ignore"}])
def test_wrong_options_are_errors(option):
    with pytest.raises(ValueError, match=rf"^PointGuidedMatcher: `{next(iter(option))}` must be"):
        PointGuidedMatcher(**option)


def test_says_what_it_is():
    assert "point=2.0, class_cost='probability'" in repr(PointGuidedMatcher())
