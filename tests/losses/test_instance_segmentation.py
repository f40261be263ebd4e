import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.losses import InstanceMaskLoss, MaskLoss, instances_of_queries
from gresbox.ops import mask_bce, mask_dice
from gresbox.structures import GresTarget, InstancePrediction

SIZE = (10, 14)


def prediction(batch=2, queries=4, dtype=torch.float64, grad=False):
    embeddings = torch.randn(batch, queries, 3, dtype=dtype).requires_grad_(grad)
    pixels = torch.randn(batch, 3, 5, 7, dtype=dtype).requires_grad_(grad)
    unread = torch.zeros(batch, queries, 3)
    return InstancePrediction(torch.zeros(batch, queries), embeddings, pixels, unread, unread)


def random_targets(counts, size=SIZE):
    return [GresTarget(torch.rand(count, *size) > 0.5) for count in counts]


def matching(counts, queries=4):
    """The last queries, backwards; -1 where there are more targets."""
    rows = torch.full((len(counts), max(counts)), -1)
    for b, count in enumerate(counts):
        used = min(count, queries)
        rows[b, :used] = torch.arange(queries - 1, queries - 1 - used, -1)
    return rows


def reference(step, targets, matches, *, unmatched=0.2, align_corners=False):
    """Eq. (6), mask by mask."""
    positive, negative = [], []
    for b, target in enumerate(targets):
        masks = torch.einsum("nc,chw->nhw", step.mask_embeddings[b], step.pixels[b])
        masks = F.interpolate(masks[None], size=SIZE, mode="bilinear", align_corners=align_corners)[0]
        rows = matches[b].tolist()
        for i, mask in enumerate(masks):
            found = [target.masks[j] for j, row in enumerate(rows) if row == i]
            truth = found[0].double() if found else torch.zeros(SIZE, dtype=torch.float64)
            probs = mask.sigmoid()
            bce = F.binary_cross_entropy_with_logits(mask, truth)
            dice = 1 - (2 * (probs * truth).sum() + 1) / (probs.sum() + truth.sum() + 1)
            (positive if found else negative).append(torch.stack([bce, dice]))
    losses = {}
    for prefix, weight, terms in (("mask", 1, positive), ("unmatched", unmatched, negative)):
        mean = torch.stack(terms).mean(0) if terms else torch.zeros(2)
        losses |= {f"{prefix}_bce": weight * mean[0], f"{prefix}_dice": weight * mean[1]}
    return losses


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [6, 1], [4, 4]])
@pytest.mark.parametrize("align_corners", [False, True])
def test_matches_the_equation_and_its_gradients(counts, align_corners):
    step, targets, matches = prediction(grad=True), random_targets(counts), matching(counts)
    losses = InstanceMaskLoss()(step, targets, matches, align_corners=align_corners)
    expected = reference(step, targets, matches, align_corners=align_corners)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-9, check_dtype=False, msg=name)
    leaves = [step.mask_embeddings, step.pixels]
    ours, theirs = (torch.autograd.grad(sum(each.values()), leaves) for each in (losses, expected))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", range(4))
def test_is_the_official_one_but_for_its_nan(golden, case):
    at = {key[3:]: torch.from_numpy(value) for key, value in golden("igvg_insseg").items() if key.startswith(f"c{case}_")}
    masks = at["pred"]
    unread = torch.zeros(*masks.shape[:2], 2)
    step = InstancePrediction.from_masks(torch.zeros(masks.shape[:2]), masks, unread, unread)
    targets = [GresTarget(at[f"gt{b}"] > 0) for b in range(len(masks))]
    matches = torch.full((len(masks), int(at["sizes"].max())), -1)
    for b in range(len(masks)):
        matches[b, at[f"dst{b}"]] = at[f"src{b}"]
    losses = InstanceMaskLoss(unmatched=at["neg"].item())(step, targets, matches)
    total = sum(losses.values())
    assert set(losses) == {"mask_bce", "mask_dice", *(("unmatched_bce", "unmatched_dice") if at["neg"] else ())}
    if case < 2:
        assert total.item() == pytest.approx(at["loss"].item(), rel=1e-6)
        return
    assert at["loss"].isnan()
    empty = ("mask_bce", "mask_dice") if case == 2 else ("unmatched_bce", "unmatched_dice")
    assert all(losses[name] == 0 for name in empty)
    assert total > 0


def test_one_pair_is_the_official_segmentation_loss(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_maskloss").items()}
    logits, target = at["logits"].flatten(1), at["target"].flatten(1).float()
    bce, dice = mask_bce(logits, target), mask_dice(logits, target)
    assert bce.mean().item() == pytest.approx(at["bce"].item(), rel=1e-6)
    assert dice.mean().item() == pytest.approx(at["dice"].item(), rel=1e-6)
    assert (bce + dice).mean().item() == pytest.approx(at["seg_d1_b1"].item(), rel=1e-6)
    assert (0.5 * bce + 2 * dice).mean().item() == pytest.approx(at["seg_d2_b05"].item(), rel=1e-6)
    unread = torch.zeros(3, 1, 2)
    step = InstancePrediction.from_masks(torch.zeros(3, 1), at["logits"], unread, unread)
    losses = InstanceMaskLoss()(step, [GresTarget(mask[None] > 0) for mask in at["target"]], torch.zeros(3, 1).long())
    assert (losses["mask_bce"] + losses["mask_dice"]).item() == pytest.approx(at["seg_d1_b1"].item(), rel=1e-6)
    assert losses["unmatched_bce"] == losses["unmatched_dice"] == 0


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=3), st.integers(0, 5))
@settings(max_examples=15)
def test_the_matching_propagates_to_queries(rows, count):
    matches = torch.tensor(rows)[:, :count]
    instances = instances_of_queries(matches, 5)
    assert instances.shape == (len(rows), 5)
    for b, row in enumerate(matches.tolist()):
        for j, query in enumerate(row):
            assert instances[b, query] == j
        assert (instances[b] >= 0).sum() == count
    steps = instances_of_queries(matches.expand(3, -1, -1), 5)
    assert torch.equal(steps[2], instances)


def test_targets_without_a_query_are_left_out():
    assert instances_of_queries(torch.tensor([[1, -1, 0, -1]]), 2).tolist() == [[2, 0]]
    assert instances_of_queries(torch.zeros(2, 0).long(), 3).tolist() == [[-1] * 3] * 2


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(max_examples=10)
def test_the_order_of_queries_does_not_matter(seed, order):
    torch.manual_seed(seed)
    step, targets, matches = prediction(), random_targets([2, 1]), matching([2, 1])
    moved = InstancePrediction(step.score_logits, step.mask_embeddings[:, list(order)], step.pixels, step.queries, step.tokens)
    place = torch.tensor(order).argsort()
    renamed = torch.where(matches >= 0, place[matches.clamp(min=0)], -1)
    for name, value in InstanceMaskLoss()(step, targets, matches).items():
        torch.testing.assert_close(InstanceMaskLoss()(moved, targets, renamed)[name], value)


def test_without_unmatched_queries_only_matched_masks_are_built(monkeypatch):
    from gresbox.losses import instance_segmentation

    built, real = [], instance_segmentation.matched_masks
    monkeypatch.setattr(instance_segmentation, "matched_masks", lambda *a: built.append(real(*a).shape) or real(*a))
    step, targets, matches = prediction(), random_targets([2, 1]), matching([2, 1])
    whole, matched = InstanceMaskLoss()(step, targets, matches), InstanceMaskLoss(unmatched=0.0)(step, targets, matches)
    assert built == [(2, 1, 4, 5, 7), (2, 1, 2, 5, 7)]
    assert set(matched) == {"mask_bce", "mask_dice"}
    for name, value in matched.items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize(
    ("unmatched", "options"),
    [(0.2, {}), (0.0, {}), (0.2, {"full_size": False}), (0.0, {"full_size": False}), (0.2, {"mask_loss": MaskLoss(20)})],
)
@pytest.mark.parametrize("counts", [[0, 0], [6, 2], [4, 4]])
def test_every_batch_is_finite_and_reaches_both_factors(unmatched, options, counts):
    step = prediction(dtype=torch.float32, grad=True)
    losses = InstanceMaskLoss(unmatched=unmatched, **options)(step, random_targets(counts), matching(counts))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for leaf in (step.mask_embeddings, step.pixels):
        assert leaf.grad.isfinite().all()
        assert bool(leaf.grad.any()) == (any(counts) or unmatched > 0)


def test_at_the_masks_own_size_targets_are_averaged():
    step, targets, matches = prediction(), random_targets([1, 1]), matching([1, 1])
    losses = InstanceMaskLoss(full_size=False)(step, targets, matches)
    truth = torch.stack([F.adaptive_avg_pool2d(target.masks.double(), (5, 7))[0] for target in targets])
    masks = torch.einsum("bc,bchw->bhw", step.mask_embeddings[:, 3], step.pixels)
    torch.testing.assert_close(losses["mask_bce"], F.binary_cross_entropy_with_logits(masks, truth), rtol=1e-6, atol=1e-7)


def test_a_mask_loss_may_enlarge_by_itself():
    step, targets, matches = prediction(), random_targets([2, 1]), matching([2, 1])
    twice = InstanceMaskLoss(mask_loss=MaskLoss(upsample=2))(step, targets, matches)  # 5 x 7 to 10 x 14, the targets' size
    for name, value in InstanceMaskLoss()(step, targets, matches).items():
        torch.testing.assert_close(twice[name], value)


def test_autocast_does_not_change_the_loss():
    step, targets, matches = prediction(dtype=torch.float32), random_targets([2, 1]), matching([2, 1])
    plain = InstanceMaskLoss()(step, targets, matches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = InstanceMaskLoss()(step, targets, matches)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            ValueError,
            lambda: (prediction(), random_targets([1, 1]), torch.zeros(3, 1).long()),
            r"`matches` must be \(B, M\) with B=2",
        ),
        (
            ValueError,
            lambda: (prediction(), random_targets([1]), torch.zeros(2, 1).long()),
            r"`targets` must be one per image with B=2",
        ),
        (TypeError, lambda: (prediction(), [1, 2], torch.zeros(2, 1).long()), r"`targets` must be a list of GresTarget, got int\."),
        (
            ValueError,
            lambda: (prediction(), [*random_targets([1]), *random_targets([1], (9, 9))], torch.zeros(2, 1).long()),
            r"`targets` must all have one image size in a batch, got \(9, 9\) and \(10, 14\)\.",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(kind, call, message):
    with pytest.raises(kind, match=f"^InstanceMaskLoss: {message}"):
        InstanceMaskLoss()(*call())


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match=r"^InstanceMaskLoss: `unmatched` must be at least 0\.0, got -1\."):
        InstanceMaskLoss(unmatched=-1.0)
