import itertools

import pytest
import torch
from torch.nn import functional as F

from gresbox.losses import MaskLoss, mask, matched_masks
from gresbox.structures import InstancePrediction


def steps_of(count=3, batch=2, queries=6, shared=True, dtype=torch.float64):
    pixels = torch.randn(batch, 4, 5, 7, dtype=dtype)
    return [
        InstancePrediction(
            torch.randn(batch, queries, dtype=dtype),
            torch.randn(batch, queries, 4, dtype=dtype, requires_grad=True),
            (pixels if shared else pixels.clone() * (index + 1)).requires_grad_(),
            torch.randn(batch, queries, 4, dtype=dtype),
            torch.randn(batch, 3, 4, dtype=dtype),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_matched_masks_are_rows_of_all_masks(shared):
    steps = steps_of(shared=shared)
    indices = torch.randint(0, 6, (3, 2, 4))
    indices[1, 0, 2:] = -1
    masks = matched_masks(steps, indices)
    assert masks.dtype == torch.float64
    for s, step in enumerate(steps):
        full = torch.einsum("bnc,bchw->bnhw", step.mask_embeddings, step.pixels)
        for b in range(2):
            torch.testing.assert_close(masks[b, s], full[b, indices[s, b].clamp(min=0)])
    weight = torch.randn_like(masks)
    leaves = [step.mask_embeddings for step in steps] + list({id(s.pixels): s.pixels for s in steps}.values())
    full = torch.stack([torch.einsum("bnc,bchw->bnhw", s.mask_embeddings, s.pixels) for s in steps], 1)  # (B, S, N, h, w)
    rows = full.take_along_dim(indices.clamp(min=0).transpose(0, 1)[..., None, None], 2)
    ours, theirs = (torch.autograd.grad((values * weight).sum(), leaves) for values in (masks, rows))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_no_matches_still_reach_embeddings_and_pixels():
    steps = steps_of()
    masks = matched_masks(steps, torch.zeros(3, 2, 0, dtype=torch.int64))
    assert masks.shape == (2, 3, 0, 5, 7)
    masks.sum().backward()
    assert all(step.mask_embeddings.grad.eq(0).all() and step.pixels.grad.eq(0).all() for step in steps)


def test_only_matched_masks_are_built(monkeypatch):
    """Neither all masks of a step nor a copy of the pixels per mask is ever made."""
    largest, steps = [], steps_of(queries=60)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if isinstance(o, torch.Tensor))
            return out

    with Watch():
        bce, dice = MaskLoss()(matched_masks(steps, torch.randint(0, 60, (3, 2, 2))), torch.rand(2, 2, 5, 7))
        (bce.sum() + dice.sum()).backward()
    assert max(largest) <= max(3 * 2 * 60 * 4, 3 * 2 * 2 * 35)  # the embeddings, or the matched masks


def test_autocast_does_not_lower_the_masks_precision():
    steps = steps_of(dtype=torch.float32)
    indices = torch.randint(0, 6, (3, 2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = matched_masks(steps, indices)
        losses = MaskLoss()(masks, torch.ones(2, 4, 5, 7))
    expected = torch.stack([torch.stack([step.masks[b, indices[s, b]] for s, step in enumerate(steps)]) for b in range(2)])
    torch.testing.assert_close(masks, expected, rtol=1e-5, atol=1e-5)
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize("case", ["hard", "soft", "empty_gt", "sat"])
def test_dense_losses_are_mask2formers(golden, case):
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("m2f_losses").items() if k.startswith(f"{case}/")}
    logits, targets = at["logits"].requires_grad_(), at["targets"]
    bce, dice = MaskLoss()(logits[None, None, :, None], targets[None, :, None])
    for name, loss in {"bce": bce, "dice": dice}.items():
        total = loss.sum() / at["num_masks"]
        torch.testing.assert_close(total, at[name], rtol=1e-9, atol=1e-9)
        (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(grad, at[f"grad_{name}"], rtol=1e-7, atol=1e-9)


def test_points_are_mask2formers(golden, monkeypatch):
    """The golden draw of candidates and extra points, through the module's sampling."""
    at = {k.split("/")[1]: torch.from_numpy(v) for k, v in golden("m2f_losses").items() if k.startswith("uncertain/")}
    noise = torch.cat([at["candidates"], at["extra"]], 1)
    seen, real = [], mask.uncertain_points
    monkeypatch.setattr(mask, "uncertain_points", lambda *a, **k: seen.append(real(*a, **{**k, "noise": noise})) or seen[-1])
    masks = at["logits"].transpose(0, 1)[None]  # three masks of one image
    targets = (torch.rand(1, 3, 12, 14) > 0.5).double()
    bce, dice = MaskLoss(20)(masks, targets)
    torch.testing.assert_close(seen[0], at["coords"], rtol=1e-9, atol=1e-9)
    grid = 2 * at["coords"][:, None] - 1
    values = F.grid_sample(masks[0, 0][:, None], grid, align_corners=False)[:, 0, 0]
    labels = F.grid_sample(targets[0][:, None], grid, align_corners=False)[:, 0, 0]
    torch.testing.assert_close(bce[0, 0], F.binary_cross_entropy_with_logits(values, labels, reduction="none").mean(-1))
    probs = values.sigmoid()
    torch.testing.assert_close(dice[0, 0], 1 - (2 * (probs * labels).sum(-1) + 1) / (probs.sum(-1) + labels.sum(-1) + 1))


def test_points_keep_steps_images_and_targets_apart(monkeypatch):
    """Every mask and its target are read at the mask's own points, as if it were the only one."""
    masks, targets = torch.randn(2, 3, 4, 6, 6).double(), torch.rand(2, 4, 9, 9).double()
    points = torch.rand(2, 3, 4, 30, 2).double()
    loss = MaskLoss(30)
    monkeypatch.setattr(mask, "uncertain_points", lambda *_, **__: points.flatten(0, 2))
    bce, dice = loss(masks, targets)
    for b, s, m in itertools.product(range(2), range(3), range(4)):
        monkeypatch.setattr(mask, "uncertain_points", lambda *_, at=points[b, s, m], **__: at[None])
        alone = loss(masks[b, s, m][None, None, None], targets[b, m][None, None])
        torch.testing.assert_close(torch.stack([bce[b, s, m], dice[b, s, m]]), torch.cat(alone).flatten())


@pytest.mark.parametrize("count", [0, 3])
def test_enlarged_masks_are_compared_at_their_new_size(count):
    masks = torch.randn(2, 3, count, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(2, count, 10, 14, dtype=torch.float64)
    losses = MaskLoss(upsample=2)(masks, targets)
    assert losses[0].shape == (2, 3, count)
    if count:
        rows = masks.flatten(0, 1)
        larger = F.interpolate(rows, (10, 14), mode="bilinear", align_corners=False).unflatten(0, (2, 3))
        expected = MaskLoss()(larger, targets)
        torch.testing.assert_close(losses, expected)
        (grad,), (wanted,) = (torch.autograd.grad(sum(x.sum() for x in pair), masks) for pair in (losses, expected))
        torch.testing.assert_close(grad, wanted)
    sum(x.sum() for x in MaskLoss(upsample=2)(masks, targets)).backward()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, {"upsample": 2}, {"num_points": 9}])
def test_decoder_steps_are_compared_like_their_masks(shared, options):
    """Where there is a match; a place without one gets what its caller weights with 0."""
    steps, indices = steps_of(shared=shared), torch.randint(0, 6, (3, 2, 4))
    indices[:, 1, 2:] = -1
    size = (5 * options.get("upsample", 1), 7 * options.get("upsample", 1))
    targets = torch.rand(2, 4, *size, dtype=torch.float64)
    weight = torch.randn(2, 2, 3, 4, dtype=torch.float64) * (indices >= 0).transpose(0, 1)
    leaves = [step.mask_embeddings for step in steps] + list({id(s.pixels): s.pixels for s in steps}.values())
    found = []
    for inputs in ((matched_masks(steps, indices), targets), (steps, targets, indices)):
        loss = MaskLoss(**options, generator=torch.Generator().manual_seed(0))
        total = (torch.stack(loss(*inputs)) * weight).sum()
        found.append([total, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(found[1], found[0])


def test_decoder_steps_need_their_matches():
    with pytest.raises(TypeError, match=r"^MaskLoss: `matches` must be given with decoder steps, got None\.$"):
        MaskLoss()(steps_of(), torch.zeros(2, 4, 5, 7))
    with pytest.raises(ValueError, match=r"^MaskLoss: `matches` must be \(S, B, M\) with S=3, got \(2, 2, 4\)\.$"):
        MaskLoss()(steps_of(), torch.zeros(2, 4, 5, 7), torch.zeros(2, 2, 4, dtype=torch.int64))


def test_points_without_instances():
    bce, dice = MaskLoss(9)(torch.zeros(2, 3, 0, 5, 7), torch.zeros(2, 0, 10, 14))
    assert bce.shape == dice.shape == (2, 3, 0)


def test_points_come_from_the_generator():
    masks, targets = torch.randn(1, 1, 2, 8, 8), torch.rand(1, 2, 16, 16)
    runs = [MaskLoss(9, generator=torch.Generator().manual_seed(seed))(masks, targets)[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("num_points", [None, 16])
def test_compiles_to_one_graph(num_points):
    steps, indices = steps_of(dtype=torch.float32), torch.randint(0, 6, (3, 2, 4))
    targets = torch.rand(2, 4, 5, 7)
    loss = MaskLoss(num_points)

    def total(indices):
        bce, dice = loss(matched_masks(steps, indices), targets)
        return bce.sum() + dice.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    value = compiled(indices)
    value.backward()
    if num_points is None:
        torch.testing.assert_close(value, total(indices))


@pytest.mark.parametrize("options", [{"num_points": 0}, {"upsample": 0}, {"oversample": 0.5}, {"importance": 1.5}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=rf"MaskLoss: `{next(iter(options))}` must be"):
        MaskLoss(**options)


def test_points_are_not_enlarged():
    with pytest.raises(ValueError, match=r"MaskLoss: `upsample` must be 1 with num_points=9, got 2\."):
        MaskLoss(9, upsample=2)


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"MaskLoss: `targets` must be \(B, M, h, w\) with h=5, w=7, got \(2, 3, 4, 7\)|with h=5"):
        MaskLoss()(torch.zeros(2, 1, 3, 5, 7), torch.zeros(2, 3, 4, 7))
    with pytest.raises(ValueError, match=r"matched_masks: `indices` must be \(S, B, M\) with S=3, got \(2, 2, 4\)\."):
        matched_masks(steps_of(), torch.zeros(2, 2, 4, dtype=torch.int64))
