import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.matchers import HungarianInstanceMatcher, hungarian
from gresbox.structures import GresTarget, InstancePrediction

CASES = ["a", "single", "more_gt", "equal"]
NAMES = ("score_logits", "mask_embeddings", "pixels", "queries", "tokens")


def with_phrase_distance(distance):
    """Queries and a single token whose phrase-object alignment losses are the given ones."""
    cosine = 1 - distance
    queries = torch.stack([cosine, (1 - cosine**2).clamp(min=0).sqrt()], -1)
    return queries[None], torch.tensor([[[1.0, 0.0]]], dtype=distance.dtype)


def golden_case(arrays, case):
    """A one-image prediction and target from flat golden masks."""
    at = {key.split("/")[1]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{case}/")}
    queries, tokens = with_phrase_distance(at["phrase"])
    step = InstancePrediction.from_masks(at["score_logit"][None], at["mask_logit"][None, :, None], queries, tokens)
    return step, GresTarget(at["gt"][:, None] > 0.5), at


def random_steps(batch=2, queries=6, steps=3, size=(5, 7), dim=4, tokens=5, dtype=torch.float64):
    pixels = torch.randn(batch, dim, *size, dtype=dtype)
    valid = torch.arange(tokens) < torch.arange(1, batch + 1)[:, None] + 1
    return [
        InstancePrediction(
            torch.randn(batch, queries, dtype=dtype),
            torch.randn(batch, queries, dim, dtype=dtype),
            pixels,
            torch.randn(batch, queries, dim, dtype=dtype),
            torch.randn(batch, tokens, dim, dtype=dtype),
            valid,
        )
        for _ in range(steps)
    ]


def random_targets(counts, size=(10, 14)):
    return [GresTarget(torch.rand(count, *size) > 0.5) for count in counts]


@pytest.fixture
def seen_costs(monkeypatch):
    """What the matcher hands to ``assign``, call by call."""
    costs, real = [], hungarian.assign

    def spy(cost, *args, **kwargs):
        costs.append(cost.clone())
        return real(cost, *args, **kwargs)

    monkeypatch.setattr(hungarian, "assign", spy)
    return costs


@pytest.mark.parametrize("case", CASES)
def test_costs_and_matching_are_the_papers(golden, seen_costs, case):
    step, target, at = golden_case(golden("instalign_matching"), case)
    ((queries, instances),) = HungarianInstanceMatcher()(step, [target])
    torch.testing.assert_close(seen_costs[0][0], at["cost_total"], rtol=1e-9, atol=1e-9)
    by_target = at["cols"].argsort()
    assert queries.tolist() == at["rows"][by_target].tolist()
    assert instances.tolist() == at["cols"][by_target].tolist()


def test_each_cost_term_is_the_papers(golden, seen_costs):
    step, target, at = golden_case(golden("instalign_matching"), "a")
    off = {"score": 0.0, "mask": 0.0, "phrase": 0.0}
    terms = {"score": at["cost_score"], "mask": at["cost_bce"] + at["cost_dice"], "phrase": at["cost_phrase"]}
    for only, expected in terms.items():
        HungarianInstanceMatcher(**{**off, only: 1.0})(step, [target])
        torch.testing.assert_close(seen_costs.pop()[0], expected.expand(-1, 3), rtol=1e-9, atol=1e-9)


def test_no_instances_match_nothing(golden):
    step, target, _ = golden_case(golden("instalign_matching"), "none")
    ((queries, instances),) = HungarianInstanceMatcher()(step, [target])
    assert queries.shape == instances.shape == (0,)
    assert queries.dtype == torch.int64
    assert HungarianInstanceMatcher().match_steps([step] * 4, [target]).shape == (4, 1, 0)


@pytest.mark.parametrize(("case", "first"), [("tie_q0", 0), ("tie_q1", 1)])
def test_the_phrase_decides_between_equal_masks(golden, case, first):
    arrays = golden("instalign_matching")
    queries, tokens = with_phrase_distance(torch.from_numpy(arrays[f"{case}/phrase"]))
    step = InstancePrediction.from_masks(torch.zeros(1, 2).double(), torch.ones(1, 2, 2, 2).double(), queries, tokens)
    target = GresTarget(torch.ones(1, 2, 2, dtype=torch.bool))
    matcher = HungarianInstanceMatcher()
    assert matcher(step, [target])[0][0].tolist() == [first] == arrays[f"{case}/rows"].tolist()
    # In a series the first step has no phrase cost, so that the tie goes to query 0 there.
    assert matcher.match_steps([step, step], [target])[:, 0, 0].tolist() == [0, first]
    assert matcher.match_steps([step, step], [target], first_phrase_step=2)[:, 0, 0].tolist() == [0, 0]


def scores_with_cost(cost_class):
    """Score logits whose cost is Mask2Former's class cost, -probability, up to a constant."""
    return -torch.log(torch.expm1(1.5 + cost_class))


@pytest.mark.parametrize("case", ["a", "more_gt", "sat", "one"])
def test_matches_mask2formers_matcher(golden, seen_costs, case):
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("m2f_matcher").items() if k.startswith(f"{case}/")}
    masks, truth = at["logits"], at["targets"]
    step = InstancePrediction.from_masks(
        scores_with_cost(at["cost_class"][:, 0])[None], masks[None, :, None], torch.zeros(1, len(masks), 2), torch.zeros(1, 1, 2)
    )
    target = GresTarget(torch.zeros(len(truth), 1, truth.shape[1], dtype=torch.bool))
    object.__setattr__(target, "masks", truth[:, None])  # golden targets are fractions of pixels
    ((queries, instances),) = HungarianInstanceMatcher(phrase=0.0)(step, [target])
    torch.testing.assert_close(seen_costs[0][0], at["total"] + 3.0, rtol=1e-5, atol=1e-5)
    by_target = at["cols"].argsort()
    assert queries.tolist() == at["rows"][by_target].tolist()
    assert instances.tolist() == at["cols"][by_target].tolist()


def test_matches_mask2formers_matcher_on_points(golden, seen_costs, monkeypatch):
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("m2f_matcher").items() if k.startswith("full/")}
    monkeypatch.setattr(hungarian.torch, "rand", lambda *size, **_: at["points"].expand(2, -1, -1))
    masks = at["pred_masks"]
    probability = at["class_logits"].softmax(-1)[..., 0]
    step = InstancePrediction.from_masks(scores_with_cost(-probability), masks, torch.zeros(2, 6, 2), torch.zeros(2, 1, 2))
    targets = [GresTarget(at["gt0"] > 0.5), GresTarget(torch.zeros(0, 32, 36, dtype=torch.bool))]
    pairs = HungarianInstanceMatcher(phrase=0.0, num_points=200)(step, targets)
    by_target = at["cols0"].argsort()
    assert pairs[0][0].tolist() == at["rows0"][by_target].tolist()
    assert pairs[1][0].tolist() == []
    labels = at["gt_sampled"]
    values = at["pred_sampled"]
    bce = (F.softplus(values).sum(-1)[:, None] - values @ labels.T) / 200
    probs = values.sigmoid()
    dice = 1 - (2 * probs @ labels.T + 1) / (probs.sum(-1)[:, None] + labels.sum(-1) + 1)
    expected = 5 * (bce + dice) + 2 * (1.5 - probability[0][:, None])
    torch.testing.assert_close(seen_costs[0][0], expected, rtol=1e-5, atol=1e-5)


def test_points_come_from_the_generator():
    steps, targets = random_steps(), random_targets([2, 3])
    runs = [
        HungarianInstanceMatcher(num_points=7, generator=torch.Generator().manual_seed(seed)).match_steps(steps, targets)
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert torch.equal(runs[0], runs[1])
    assert any(not torch.equal(runs[0], other) for other in runs[2:])


def test_many_points_find_what_all_pixels_find():
    queries = torch.randn(1, 4, 8)
    masks = F.interpolate(torch.randn(1, 4, 3, 3), size=(24, 24), mode="bilinear") * 9
    step = InstancePrediction.from_masks(torch.zeros(1, 4), masks, queries, torch.randn(1, 2, 8))
    target = GresTarget(masks[0, [3, 0, 1]] > 0)
    assert HungarianInstanceMatcher(num_points=500)(step, [target])[0][0].tolist() == [3, 0, 1]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 4))
def test_the_matching_is_the_cheapest_of_all(seed, num_queries, count):
    torch.manual_seed(seed)
    (step,) = random_steps(1, num_queries, 1)
    targets = random_targets([count])
    matcher = HungarianInstanceMatcher()
    ((rows, columns),) = matcher(step, targets)
    assert len(rows) == min(num_queries, count) == len(set(rows.tolist()))
    assert columns.tolist() == sorted(columns.tolist())
    if count == 0:
        return
    cost = reference_cost(step, targets[0])
    smaller = min(num_queries, count)
    best = min(
        float(sum(cost[i, j] for i, j in zip(chosen, places, strict=True)))
        for chosen in itertools.permutations(range(num_queries), smaller)
        for places in itertools.combinations(range(count), smaller)
    )
    assert float(cost[rows, columns].sum()) == pytest.approx(best, abs=1e-5)


def reference_cost(step, target):
    """Eq. (6) pair by pair."""
    size = step.pixels.shape[-2:]
    truth = F.adaptive_avg_pool2d(target.masks[:, None].double(), size)[:, 0].flatten(1)
    masks = torch.einsum("nc,cp->np", step.mask_embeddings[0], step.pixels[0].flatten(1))
    tokens = step.tokens[0][step.valid[0]]
    cost = torch.zeros(len(masks), len(truth)).double()
    for i, j in itertools.product(range(len(masks)), range(len(truth))):
        query, probs = step.queries[0, i], masks[i].sigmoid()
        phrase = ((tokens @ query) / len(query) ** 0.5).softmax(0) @ tokens
        cost[i, j] = (
            2 * F.softplus(-step.score_logits[0, i])
            + 5 * F.binary_cross_entropy_with_logits(masks[i], truth[j])
            + 5 * (1 - (2 * (probs * truth[j]).sum() + 1) / (probs.sum() + truth[j].sum() + 1))
            + (1 - F.cosine_similarity(phrase, query, dim=0))
        )
    return cost


@given(st.integers(0, 10_000), st.permutations(range(6)))
def test_permuted_queries_permute_the_match(seed, order):
    torch.manual_seed(seed)
    (step,) = random_steps(2, 6, 1)
    targets = random_targets([3, 1])
    moved = InstancePrediction(
        step.score_logits[:, order], step.mask_embeddings[:, order], step.pixels, step.queries[:, order], step.tokens, step.valid
    )
    matcher = HungarianInstanceMatcher()
    for (rows, _), (moved_rows, _) in zip(matcher(step, targets), matcher(moved, targets), strict=True):
        assert [order[row] for row in moved_rows.tolist()] == rows.tolist()


@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_permuted_targets_permute_the_match(seed, order):
    torch.manual_seed(seed)
    (step,) = random_steps(1, 6, 1)
    (target,) = random_targets([4])
    matcher = HungarianInstanceMatcher()
    ((rows, _),) = matcher(step, [target])
    ((moved_rows, _),) = matcher(step, [GresTarget(target.masks[list(order)])])
    assert moved_rows.tolist() == rows[list(order)].tolist()


@pytest.mark.parametrize("counts", [[0, 3], [2, 1], [9, 2], [0, 0]])
@pytest.mark.parametrize("num_points", [None, 40])
def test_steps_together_are_steps_alone(counts, num_points):
    steps, targets = random_steps(), random_targets(counts)

    def matcher():
        return HungarianInstanceMatcher(num_points=num_points, generator=torch.Generator().manual_seed(3))

    together = matcher().match_steps(steps, targets)
    assert together.shape == (3, 2, max(counts))
    for index, step in enumerate(steps):
        alone = matcher().match_steps([step], targets, first_phrase_step=0 if index else 1)
        assert torch.equal(together[index], alone[0])
    for row, count in zip(together.transpose(0, 1), counts, strict=True):
        assert (row[:, :count].ge(0).sum(1) == min(count, 6)).all()
        assert (row[:, count:] == -1).all()


@pytest.mark.parametrize("num_points", [None, 40])
def test_steps_may_have_their_own_pixels(seen_costs, num_points):
    steps = [step for _ in range(3) for step in random_steps(steps=1)]
    targets = random_targets([3, 1])

    def matcher():
        return HungarianInstanceMatcher(num_points=num_points, generator=torch.Generator().manual_seed(3))

    matcher().match_steps(steps, targets, first_phrase_step=0)
    for step in steps:
        matcher().match_steps([step], targets, first_phrase_step=0)
    torch.testing.assert_close(seen_costs[0], torch.cat(seen_costs[1:]))


def test_images_are_matched_independently():
    steps, targets = random_steps(3), random_targets([2, 0, 4])
    matcher = HungarianInstanceMatcher()
    together = matcher.match_steps(steps, targets)
    names = (*NAMES, "valid")
    for b in range(3):
        part = [InstancePrediction(*(getattr(step, name)[b : b + 1] for name in names)) for step in steps]
        alone = matcher.match_steps(part, [targets[b]])
        assert torch.equal(together[:, b, : alone.shape[-1]], alone[:, 0])


@pytest.mark.parametrize("large", [False, True])
def test_all_steps_are_priced_and_assigned_at_once(monkeypatch, large):
    """Large images on a CPU one by one, each with its own targets; one without is not priced then."""
    calls = []
    monkeypatch.setattr(hungarian, "_LARGE", 0 if large else 2**40)
    for name in ("assign", "query_mask_cost"):
        real = getattr(hungarian, name)

        def spy(*args, _name=name, _real=real, **kwargs):
            calls.append((_name, tuple(tuple(x.shape[:2]) for x in args[:3:2])))  # queries and targets
            return _real(*args, **kwargs)

        monkeypatch.setattr(hungarian, name, spy)
    steps = random_steps(steps=5, batch=3)
    queries = steps[0].score_logits.shape[1]
    HungarianInstanceMatcher().match_steps(steps, random_targets([2, 0, 1]))
    sizes = [(1, 2), (1, 1)] if large else [(3, 2)]
    priced = [("query_mask_cost", ((batch, 5 * queries), (batch, count))) for batch, count in sizes]
    assert calls == [*priced, ("assign", ((5 * 3, queries),))]


@pytest.mark.parametrize("num_points", [None, 9])
def test_one_by_one_or_together_the_costs_are_equal(monkeypatch, seen_costs, num_points):
    steps, targets = random_steps(batch=3), random_targets([2, 0, 3])
    for large in (0, 2**40):
        monkeypatch.setattr(hungarian, "_LARGE", large)
        matcher = HungarianInstanceMatcher(num_points=num_points, generator=torch.Generator().manual_seed(0))
        matcher.match_steps(steps, targets)
    first, second = (cost.unflatten(0, (-1, 3)) for cost in seen_costs)
    for image, count in enumerate((2, 0, 3)):
        torch.testing.assert_close(first[:, image, :, :count], second[:, image, :, :count])


def test_targets_of_several_sizes_are_averaged_to_the_masks_size():
    (step,) = random_steps(steps=1)
    targets = [*random_targets([2], (10, 14)), *random_targets([1], (20, 21))]
    pairs = HungarianInstanceMatcher()(step, targets)
    assert [len(rows) for rows, _ in pairs] == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_costs(seen_costs, dtype):
    steps, targets = random_steps(dtype=dtype), random_targets([2, 1])
    plain = HungarianInstanceMatcher().match_steps(steps, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = HungarianInstanceMatcher().match_steps(steps, targets)
    assert torch.equal(plain, cast)
    assert seen_costs[0].dtype == torch.float32
    assert torch.equal(*seen_costs)


def test_half_precision_predictions_have_float32_costs(seen_costs):
    steps, targets = random_steps(dtype=torch.bfloat16), random_targets([2, 1])
    wide = [replace(step, **{name: getattr(step, name).float() for name in NAMES}) for step in steps]
    for predictions in (steps, wide):
        HungarianInstanceMatcher().match_steps(predictions, targets)
    torch.testing.assert_close(*seen_costs, rtol=1e-6, atol=1e-6)


def test_no_gradient_is_recorded(seen_costs):
    steps = random_steps()
    for step in steps:
        step.queries.requires_grad_()
        step.mask_embeddings.requires_grad_()
    HungarianInstanceMatcher().match_steps(steps, random_targets([1, 1]))
    assert not seen_costs[0].requires_grad


@pytest.mark.parametrize(
    ("field", "term"),
    [
        ("score_logits", "score"),
        ("mask_embeddings", "mask bce and mask dice"),
        ("pixels", "mask bce and mask dice"),
        ("queries", "phrase"),
        ("tokens", "phrase"),
    ],
)
def test_a_nan_cost_names_its_term_and_source(field, term):
    steps = random_steps()
    if field == "pixels":
        steps[2].pixels[1, 0, 0, 0] = torch.nan
        where = 0  # the first step that reads them
    else:
        getattr(steps[2], field)[1, 0] = torch.nan
        where = 2
    expected = f"^HungarianInstanceMatcher: `{field}` of step {where} must be finite because the {term} cost reads it, got NaN"
    with pytest.raises(ValueError, match=expected):
        HungarianInstanceMatcher().match_steps(steps, random_targets([1, 2]))


def test_overflowing_masks_are_named():
    steps = random_steps(dtype=torch.float32)
    steps[0].pixels.fill_(1e30)
    steps[1].mask_embeddings.fill_(1e30)
    with pytest.raises(ValueError, match="mask logits overflow"):
        HungarianInstanceMatcher().match_steps(steps, random_targets([1, 2]))


def test_nan_can_count_as_large():
    steps, targets = random_steps(), random_targets([1, 2])
    steps[1].score_logits[0, 2] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN"):
        rows = HungarianInstanceMatcher(nan="large").match_steps(steps, targets)
    assert rows[1, 0, 0] not in (2, -1)
    assert torch.equal(rows[0], HungarianInstanceMatcher().match_steps(steps[:1], targets)[0])


def test_nan_in_padding_does_not_matter():
    steps, targets = random_steps(), random_targets([1, 2])
    expected = HungarianInstanceMatcher().match_steps(steps, targets)
    for step in steps:
        step.tokens[~step.valid] = torch.nan
    assert torch.equal(HungarianInstanceMatcher().match_steps(steps, targets), expected)
    steps[2].score_logits[0, 0] = torch.nan  # what is named is not the padding of step 1
    with pytest.raises(ValueError, match="`score_logits` of step 2"):
        HungarianInstanceMatcher().match_steps(steps, targets)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, lambda s, t: (s, t[:1]), r"^HungarianInstanceMatcher: `targets` must be one per image with B=2, got 1\."),
        (TypeError, lambda s, t: (s, [t[0], {"masks": 1}]), r"`targets` must be a list of GresTarget, got dict\."),
        (ValueError, lambda s, t: (s, [t[0], t[1].to("meta")]), r"must be on cpu like the prediction, got meta; move them with"),
        (ValueError, lambda s, t: ([], t), r"`predictions` must be at least one decoder step, got none\."),
        (
            ValueError,
            lambda s, t: ([s[0], *random_steps(queries=5)], t),
            r"`score_logits of step 1` must be \(B, N\) with N=6, got",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(kind, change, message):
    steps, targets = change(random_steps(), random_targets([1, 2]))
    with pytest.raises(kind, match=message):
        HungarianInstanceMatcher().match_steps(steps, targets)


@pytest.mark.parametrize("option", [{"score": -1.0}, {"num_points": 0}, {"nan": "ignore"}])
def test_wrong_options_are_errors(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        HungarianInstanceMatcher(**option)
