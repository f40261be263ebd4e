from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.losses import InstAlignCriterion, InstAlignWeights, MaskLoss, POALoss
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.ops import aggregate_masks
from gresbox.structures import GresOutput, GresTarget, InstancePrediction

SIZE = (10, 14)
LEAVES = ("score_logits", "mask_embeddings", "pixels", "queries", "tokens")


def outputs(batch=2, queries=6, steps=3, dtype=torch.float64, grad=False, no_target=True):
    """A model's output with all its parts random; pixels shared by the steps."""
    pixels = torch.randn(batch, 4, 5, 7, dtype=dtype).requires_grad_(grad)
    valid = torch.arange(5) < torch.arange(1, batch + 1)[:, None] % 4 + 1

    def part(*shape):
        return torch.randn(batch, *shape, dtype=dtype).requires_grad_(grad)

    predictions = [
        InstancePrediction(part(queries), part(queries, 4), pixels, part(queries, 4), part(5, 4), valid) for _ in range(steps)
    ]
    return GresOutput(part(5, 7), part() if no_target else None, predictions[-1], tuple(predictions[:-1]))


def random_targets(counts, size=SIZE):
    return [GresTarget(torch.rand(count, *size) > 0.5) for count in counts]


def criterion(**options):
    return InstAlignCriterion(HungarianInstanceMatcher(), **options)


def images(output, start, stop):
    """The same output for some images of the batch only."""

    def cut(step):
        return InstancePrediction(*(getattr(step, name)[start:stop] for name in (*LEAVES, "valid")))

    pixels = output.instances.pixels[start:stop]
    steps = [replace(cut(step), pixels=pixels) for step in (*output.aux, output.instances)]
    return GresOutput(output.merged[start:stop], output.no_target[start:stop], steps[-1], tuple(steps[:-1]))


def reference(output, targets, num_instances=None, weights=None):
    """Eq. (6)-(9) and (13) query by query; only the matching is taken from the matcher."""
    weights = weights or InstAlignWeights()
    steps = (*output.aux, output.instances)
    matches = HungarianInstanceMatcher().match_steps(steps, targets)
    normaliser = num_instances or max(sum(len(t.masks) for t in targets), 1)
    terms = dict.fromkeys(("merged_bce", "merged_dice", "no_target", "score", "mask_bce", "mask_dice", "phrase"), 0.0)

    def dice(s, t):
        return 1 - (2 * (s.sigmoid() * t).sum() + 1) / (s.sigmoid().sum() + t.sum() + 1)

    for b, target in enumerate(targets):
        z = F.interpolate(output.merged[b][None, None], size=SIZE, mode="bilinear")[0, 0]
        terms["merged_bce"] += weights.merged * F.binary_cross_entropy_with_logits(z, target.merged.double()) / len(targets)
        terms["merged_dice"] += weights.merged * dice(z, target.merged.double()) / len(targets)
        label = torch.tensor(float(target.no_target)).double()
        terms["no_target"] += weights.no_target * F.binary_cross_entropy_with_logits(output.no_target[b], label) / len(targets)
        truth = F.adaptive_avg_pool2d(target.masks[:, None].double(), (5, 7))[:, 0] if len(target.masks) else []
        for s, step in enumerate(steps):
            query_of = matches[s, b].tolist()
            for i, logit in enumerate(step.score_logits[b]):
                cost = weights.score * F.softplus(-logit) if i in query_of else F.softplus(logit)
                terms["score"] += cost / normaliser
            for j, i in enumerate(query_of[: len(truth)]):
                if i < 0:
                    continue
                logits = torch.einsum("c,chw->hw", step.mask_embeddings[b, i], step.pixels[b])
                terms["mask_bce"] += weights.mask * F.binary_cross_entropy_with_logits(logits, truth[j]) / normaliser
                terms["mask_dice"] += weights.mask * dice(logits, truth[j]) / normaliser
                if s:
                    tokens, query = step.tokens[b][step.valid[b]], step.queries[b, i]
                    phrase = (tokens @ query / 2).softmax(0) @ tokens
                    terms["phrase"] += weights.phrase * (1 - F.cosine_similarity(phrase, query, dim=0)) / normaliser
    return terms


def leaves_of(output):
    steps = (*output.aux, output.instances)
    named = {"merged": output.merged, "no_target": output.no_target, "pixels": output.instances.pixels}
    for index, step in enumerate(steps):
        named |= {f"{name} of step {index}": getattr(step, name) for name in LEAVES if name != "pixels"}
    return named


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [8, 1]])
def test_matches_the_equations_and_their_gradients(counts):
    output, targets = outputs(grad=True), random_targets(counts)
    losses, expected = criterion()(output, targets), reference(output, targets)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-5, abs=1e-6), name
    total = sum(expected.values())
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    named = leaves_of(output)
    got = torch.autograd.grad(losses["loss"], list(named.values()), allow_unused=True)
    want = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for name, ours, theirs in zip(named, got, want, strict=True):
        theirs = torch.zeros_like(named[name]) if theirs is None else theirs
        if ours is None:
            assert name in {"queries of step 0", "tokens of step 0"}  # no phrase loss before the first block
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7, msg=name)


def golden_output(at):
    cosine = 1 - at["phrase"]
    queries = torch.stack([cosine, (1 - cosine**2).clamp(min=0).sqrt()], -1)[None]
    tokens = torch.tensor([[[1.0, 0.0]]]).double()
    step = InstancePrediction.from_masks(at["score_logit"][None], at["mask_logit"][None, :, None], queries, tokens)
    return GresOutput(torch.zeros(1, 1, at["mask_logit"].shape[1]), None, step), [GresTarget(at["gt"][:, None] > 0.5)]


@pytest.mark.parametrize("case", ["a", "single", "none", "more_gt", "equal"])
def test_instance_losses_are_the_papers(golden, case):
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("instalign_matching").items() if k.startswith(f"{case}/")}
    output, targets = golden_output(at)
    losses = criterion()(output, targets, num_instances=1)
    expected = {name: at[f"loss_{part}"] for name, part in {"mask_bce": "bce", "mask_dice": "dice", "phrase": "phrase"}.items()}
    expected["score"] = at["loss_score_pos"] + at["loss_score_neg"]
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(float(value), rel=1e-6), name
    total = losses["loss"] - losses["merged_bce"] - losses["merged_dice"]
    assert total.item() == pytest.approx(float(at["loss_total"]), rel=1e-5)


@pytest.mark.parametrize("case", ["scalar", "zero_slope", "identity", "per_query", "saturated"])
def test_merged_loss_is_the_papers(golden, case):
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("instalign_aia").items() if k.startswith(f"{case}/")}
    scores, masks, slope = (at[name].requires_grad_() for name in ("score_logit", "mask_logit", "slope"))
    output = GresOutput(aggregate_masks(masks, scores.sigmoid(), slope))
    targets = [GresTarget(gt[None] > 0.5) for gt in at["gt"]]
    losses = criterion(supervision="none", weights=InstAlignWeights(merged=1.0))(output, targets)
    assert losses["merged_bce"].item() == pytest.approx(float(at["bce"]), rel=1e-5)
    assert losses["merged_dice"].item() == pytest.approx(float(at["dice"]), rel=1e-5)
    losses["loss"].backward()
    for name, leaf in {"score_logit": scores, "mask_logit": masks}.items():
        torch.testing.assert_close(leaf.grad, at[f"grad_{name}"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope.grad.reshape(-1), at["grad_slope"].reshape(-1), rtol=1e-4, atol=1e-6)


def test_weights_of_the_parts_are_the_papers(golden):
    merged, instance, no_target = golden("instalign_nt")["total_example_in"]
    weights = InstAlignWeights()
    total = weights.merged * merged + weights.instance * instance + weights.no_target * no_target
    assert total == pytest.approx(float(golden("instalign_nt")["total_example"]))
    output, targets = outputs(), random_targets([2, 0])
    losses = criterion()(output, targets)
    one = criterion(weights=InstAlignWeights(1, 1, 1, 1, 1, 1))(output, targets)
    for name, factor in {"merged_bce": 5, "merged_dice": 5, "no_target": 0.1, "mask_bce": 5, "mask_dice": 5, "phrase": 1}.items():
        assert losses[name].item() == pytest.approx(factor * one[name].item(), rel=1e-5), name
    twice = criterion(weights=InstAlignWeights(instance=2))(output, targets)
    for name in ("score", "mask_bce", "mask_dice", "phrase"):
        assert twice[name].item() == pytest.approx(2 * losses[name].item(), rel=1e-6)


@pytest.mark.parametrize("counts", [[2, 1], [0, 0], [9, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entries_are_float32_and_add_up(counts, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion()(outputs(dtype=dtype), random_targets(counts))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {loss.shape for loss in losses.values()} == {torch.Size([])}
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "loss"), rel=1e-6)


def test_autocast_does_not_change_the_losses():
    output, targets = outputs(dtype=torch.float32), random_targets([2, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = criterion()(output, targets)
    for name, value in criterion()(output, targets).items():
        assert torch.equal(cast[name], value), name


@pytest.mark.parametrize("counts", [[0, 0], [2, 0], [9, 7]])
def test_gradients_reach_every_part_on_every_batch(counts):
    output = outputs(dtype=torch.float32, grad=True)
    losses = criterion()(output, random_targets(counts))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    for name, leaf in leaves_of(output).items():
        if name in {"queries of step 0", "tokens of step 0"}:
            assert leaf.grad is None, name
            continue
        assert leaf.grad.isfinite().all(), name
        if any(counts) or name in {"merged", "no_target"} or name.startswith("score"):
            assert leaf.grad.abs().sum() > 0, name


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(max_examples=15)
def test_the_order_of_targets_does_not_matter(seed, order):
    torch.manual_seed(seed)
    output, (first, second) = outputs(), random_targets([4, 1])
    losses = criterion()(output, [first, second])
    moved = criterion()(output, [GresTarget(first.masks[list(order)]), second])
    for name, value in losses.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 10_000), st.permutations(range(6)))
@settings(max_examples=15)
def test_the_order_of_queries_does_not_matter(seed, order):
    torch.manual_seed(seed)
    output, targets = outputs(), random_targets([3, 0])

    def moved(step):
        names = ("score_logits", "mask_embeddings", "queries")
        return replace(step, **{name: getattr(step, name)[:, list(order)] for name in names})

    permuted = replace(output, instances=moved(output.instances), aux=tuple(moved(step) for step in output.aux))
    for name, value in criterion()(output, targets).items():
        torch.testing.assert_close(criterion()(permuted, targets)[name], value, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=4, max_size=4))
@settings(max_examples=15)
@pytest.mark.parametrize(
    "options", [{}, {"score_reduction": "queries"}, {"supervision": "vanilla"}, {"merged_on_no_target": False}]
)
def test_micro_batches_average_to_the_whole_batch(options, seed, counts):
    torch.manual_seed(seed)
    output, targets = outputs(batch=4, grad=True), random_targets(counts)
    total = max(sum(counts), 1)
    whole = criterion(**options)(output, targets)
    halves = [
        criterion(**options)(images(output, start, start + 2), targets[start : start + 2], num_instances=total / 2)
        for start in (0, 2)
    ]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-6, atol=1e-6)
    leaves = [output.merged, output.instances.pixels, output.instances.score_logits]
    joint = torch.autograd.grad((halves[0]["loss"] + halves[1]["loss"]) / 2, leaves, allow_unused=True)
    alone = torch.autograd.grad(whole["loss"], leaves, allow_unused=True)
    for got, want in zip(joint, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_an_image_counts_the_same_in_any_batch():
    output, targets = outputs(batch=3), random_targets([2, 5, 0])
    for b in range(3):
        alone = criterion()(images(output, b, b + 1), targets[b : b + 1], num_instances=7)
        rest = [i for i in range(3) if i != b]
        padded = criterion()(images(output, b, b + 1), targets[b : b + 1], num_instances=torch.tensor(7.0))
        assert all(torch.equal(alone[name], padded[name]) for name in alone)
        others = [criterion()(images(output, i, i + 1), targets[i : i + 1], num_instances=7) for i in rest]
        whole = criterion()(output, targets, num_instances=7)
        for name in ("score", "mask_bce", "mask_dice", "phrase"):
            torch.testing.assert_close(alone[name] + others[0][name] + others[1][name], whole[name], rtol=1e-5, atol=1e-6)


def test_vanilla_has_no_phrase_in_cost_and_loss():
    queries = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # with the token (1, 0) the phrase prefers query 1
    step = InstancePrediction.from_masks(torch.zeros(1, 2), torch.ones(1, 2, 2, 2), queries, torch.tensor([[[1.0, 0.0]]]))
    output = GresOutput(torch.zeros(1, 2, 2), None, replace(step, score_logits=torch.tensor([[0.3, 0.2]])))
    target = [GresTarget(torch.ones(1, 2, 2, dtype=torch.bool))]
    vanilla, phrase = criterion(supervision="vanilla")(output, target), criterion()(output, target)
    assert "phrase" not in vanilla
    assert phrase["phrase"].item() == pytest.approx(0, abs=1e-6)  # query 1 was matched
    softplus = F.softplus(torch.tensor([0.3, -0.3, 0.2, -0.2]))
    assert vanilla["score"].item() == pytest.approx((2 * softplus[1] + softplus[2]).item())
    assert phrase["score"].item() == pytest.approx((2 * softplus[3] + softplus[0]).item())


def test_without_instance_supervision_the_matcher_is_not_asked():
    output, targets = outputs(grad=True), random_targets([2, 0])
    losses = InstAlignCriterion(None, supervision="none")(output, targets)
    assert set(losses) == {"loss", "merged_bce", "merged_dice", "no_target"}
    whole = criterion()(output, targets)
    assert all(torch.equal(losses[name], whole[name]) for name in losses if name != "loss")
    without = InstAlignCriterion(None, supervision="none")(replace(output, instances=None, aux=(), no_target=None), targets)
    assert set(without) == {"loss", "merged_bce", "merged_dice"}


def test_only_the_last_step_without_deep_supervision():
    output, targets = outputs(), random_targets([2, 1])
    last = criterion(deep_supervision=False)(output, targets)
    alone = criterion()(replace(output, aux=()), targets)
    assert all(torch.equal(last[name], alone[name]) for name in last)
    assert last["phrase"] > 0
    assert last["score"] < criterion()(output, targets)["score"]


def test_score_reductions():
    output, targets = outputs(), random_targets([2, 1])
    losses = {name: criterion(score_reduction=name)(output, targets)["score"].item() for name in ("instances", "queries", "m2f")}
    assert losses["queries"] == pytest.approx(losses["instances"] * 3 / 12, rel=1e-6)
    steps = (*output.aux, output.instances)
    matches = HungarianInstanceMatcher().match_steps(steps, targets)
    expected = 0.0
    for step, rows in zip(steps, matches, strict=True):
        label = torch.ones(2, 6, dtype=torch.int64)  # Mask2Former's classes: 0 the only one, 1 nothing
        for b in range(2):
            label[b, rows[b][rows[b] >= 0]] = 0
        two = torch.stack([step.score_logits, torch.zeros_like(step.score_logits)], 1)
        expected += 2 * F.cross_entropy(two, label, torch.tensor([1.0, 0.1]).double())
    assert losses["m2f"] == pytest.approx(float(expected), rel=1e-6)
    zero = criterion(weights=InstAlignWeights(unmatched=0.0))(output, targets)["score"].item()
    one = criterion(weights=InstAlignWeights(unmatched=1.0))(output, targets)["score"].item()
    three = criterion(weights=InstAlignWeights(unmatched=3.0))(output, targets)["score"].item()
    assert one == losses["instances"]
    assert three - zero == pytest.approx(3 * (one - zero), rel=1e-5)


def test_no_target_samples_can_be_left_out_of_the_merged_loss():
    output, targets = outputs(), random_targets([2, 0])
    losses = criterion(merged_on_no_target=False)(output, targets)
    first = criterion()(images(output, 0, 1), targets[:1])
    assert losses["merged_bce"].item() == pytest.approx(first["merged_bce"].item() / 2, rel=1e-6)
    assert losses["merged_dice"].item() == pytest.approx(first["merged_dice"].item() / 2, rel=1e-6)


def test_merged_losses_of_earlier_steps():
    output, targets = outputs(), random_targets([2, 1])
    merge = torch.nn.PReLU().double()

    def aggregate(step):
        return aggregate_masks(step.masks.double(), step.score_logits.sigmoid(), merge.weight[0])

    losses = criterion(aux_merged=aggregate)(output, targets)
    expected = criterion()(output, targets)
    for name in ("merged_bce", "merged_dice"):
        total = expected[name] + sum(criterion()(replace(output, merged=aggregate(step)), targets)[name] for step in output.aux)
        assert losses[name].item() == pytest.approx(total.item(), rel=1e-6)
    assert not list(criterion(aux_merged=torch.nn.Linear(1, 1)).parameters())


def test_the_merged_mask_may_hold_more_than_the_instances():
    output, masks = outputs(batch=1), torch.zeros(0, *SIZE, dtype=torch.bool)
    crowd = GresTarget(masks, merged=torch.ones(SIZE, dtype=torch.bool), no_target=False)
    losses, empty = criterion()(output, [crowd]), criterion()(output, [GresTarget(masks)])
    assert losses["score"] == empty["score"]
    assert losses["merged_bce"] != empty["merged_bce"]
    assert losses["no_target"] != empty["no_target"]


def test_upsampling_is_the_models_own():
    output, targets = outputs(), random_targets([2, 1])
    assert criterion()(replace(output, align_corners=True), targets)["merged_bce"] != criterion()(output, targets)["merged_bce"]


def test_point_sampled_masks():
    output, targets = outputs(batch=1, grad=True), random_targets([2])
    sampled = criterion(mask_loss=MaskLoss(4000, importance=0.0))(output, targets)
    dense = criterion()(output, targets)
    assert sampled["score"] == dense["score"]
    # Points read the truth at full resolution and with zeros outside, so they agree with all pixels only roughly.
    assert sampled["mask_bce"].item() == pytest.approx(dense["mask_bce"].item(), rel=0.3)
    sampled["loss"].backward()
    assert output.instances.pixels.grad.isfinite().all()
    assert criterion(mask_loss=MaskLoss(9))(outputs(grad=True), random_targets([0, 0]))["mask_bce"] == 0


def test_instance_masks_can_be_compared_enlarged():
    output, targets = outputs(grad=True), random_targets([2, 1])
    losses = criterion(mask_loss=MaskLoss(upsample=2))(output, targets)
    assert losses["mask_bce"] != criterion()(output, targets)["mask_bce"]
    assert losses["score"] == criterion()(output, targets)["score"]
    losses["loss"].backward()
    assert output.instances.pixels.grad.isfinite().all()


def test_the_phrase_loss_may_be_replaced():
    output, targets = outputs(grad=True), random_targets([2, 1])
    changed = criterion()
    changed.phrase_loss = POALoss(detach_tokens=True)
    losses = changed(output, targets)
    losses["loss"].backward()
    assert losses["phrase"] == criterion()(output, targets)["phrase"]
    assert output.instances.tokens.grad is None


@pytest.mark.parametrize(("counts", "backend"), [([2, 1], "aot_eager"), ([0, 0], "eager")])
def test_compiles_to_one_graph(counts, backend):
    output, targets = outputs(steps=2, dtype=torch.float32, grad=True), random_targets(counts)
    compiled = torch.compile(criterion(), fullgraph=True, backend=backend)
    losses = compiled(output, targets)
    for name, value in criterion()(output, targets).items():
        torch.testing.assert_close(losses[name], value)
    losses["loss"].backward()
    assert output.instances.pixels.grad is not None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, lambda o, t: (o, t[:1]), r"InstAlignCriterion: `targets` must be one per image with B=2, got 1\."),
        (TypeError, lambda o, t: (o, ["a", "b"]), r"InstAlignCriterion: `targets` must be a list of GresTarget, got str\."),
        (
            ValueError,
            lambda o, t: (o, [t[0], *random_targets([1], (9, 9))]),
            r"InstAlignCriterion: `targets` must all have one image size in a batch, got \(9, 9\) and \(10, 14\)\.",
        ),
        (
            ValueError,
            lambda o, t: (o, [t[0].to("meta"), t[1]]),
            r"InstAlignCriterion: `targets` must be on cpu like the prediction, got meta; move them with target.to\(\)\.",
        ),
        (
            ValueError,
            lambda o, t: (replace(o, instances=None), t),
            r"InstAlignCriterion: `output.instances` must be there, unless supervision='none', got None\.",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(kind, change, message):
    output, targets = change(outputs(), random_targets([2, 1]))
    with pytest.raises(kind, match=message):
        criterion()(output, targets)


@pytest.mark.parametrize("options", [{"supervision": "aligned"}, {"score_reduction": "mean"}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=rf"InstAlignCriterion: `{next(iter(options))}` must be one of"):
        criterion(**options)


@pytest.mark.parametrize("number", [0, -1.0, float("nan")])
def test_the_normaliser_must_be_positive(number):
    with pytest.raises(ValueError, match="`num_instances` must be"):
        criterion()(outputs(), random_targets([1, 1]), num_instances=number)
