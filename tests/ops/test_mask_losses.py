"""The mask losses against golden values and gradients, and those of factored masks against the masks built first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gresbox.ops import _matched_masks, mask_bce, mask_dice, mask_losses, matched_mask_losses
from gresbox.testing import assert_matches_reference


@pytest.mark.parametrize("case", ["hard", "soft", "empty_gt", "sat"])
@pytest.mark.parametrize(("function", "name"), [(mask_bce, "bce"), (mask_dice, "dice")])
def test_golden(golden, case, function, name):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("m2f_losses").items() if key.startswith(f"{case}/")}
    logits = data["logits"].requires_grad_()
    loss = function(logits, data["targets"]).sum() / data["num_masks"]
    torch.testing.assert_close(loss, data[name], rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], data[f"grad_{name}"], rtol=0, atol=1e-14)


@given(st.integers(0, 4), st.integers(1, 6), st.sampled_from([1.0, 100.0]))
def test_each_mask_on_its_own_and_any_order_of_pixels(count, pixels, scale):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks, targets = torch.randn(count, pixels) * scale, torch.rand(count, pixels) > 0.5
    order = torch.randperm(pixels)
    for function in (mask_bce, mask_dice):
        losses = function(masks, targets)
        assert losses.shape == (count,)
        assert (losses >= 0).all()
        torch.testing.assert_close(function(masks[:, order], targets[:, order].float()), losses)
        for index in range(count):
            torch.testing.assert_close(function(masks[index : index + 1], targets[index : index + 1])[0], losses[index])


def test_perfect_and_empty_masks():
    targets = torch.tensor([[True, False, False], [False, False, False]])
    masks = torch.where(targets, 200.0, -200.0).requires_grad_()
    assert (mask_bce(masks, targets) == 0).all()
    assert (mask_dice(masks, targets) == 0).all()
    total = (mask_bce(-masks, targets) + mask_dice(-masks, targets)).sum()
    assert total.isfinite()
    assert torch.autograd.grad(total, masks)[0].isfinite().all()


def test_without_pixels_both_are_zero():
    empty = torch.zeros(3, 0)
    assert torch.equal(mask_bce(empty, empty), torch.zeros(3))
    assert torch.equal(mask_dice(empty, empty), torch.zeros(3))


def test_errors():
    with pytest.raises(ValueError, match=r"^mask_bce: `targets` must be \(K, P\) with P=4, got \(2, 5\)\.$"):
        mask_bce(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"^mask_dice: `masks` must be a floating-point tensor, got torch\.bool\.$"):
        mask_dice(torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 19.0, 39.0, 41.0, 60.0, 300.0])
def test_cross_entropy_at_large_logits(dtype, size):
    masks = torch.tensor([[size, size, -size, -size]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=dtype)
    loss = mask_bce(masks, targets)
    small = math.log1p(math.exp(-size))
    assert loss.item() == pytest.approx((2 * size + 4 * small) / 4, rel=4 * torch.finfo(dtype).eps)
    right = mask_bce(masks, torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=dtype))
    assert right.item() == pytest.approx(small, rel=1e-6, abs=torch.finfo(dtype).eps * size)
    (grad,) = torch.autograd.grad(loss.sum(), masks)
    torch.testing.assert_close(grad, (masks.detach().sigmoid() - targets) / 4)


def scene(steps=3, batch=2, queries=6, channels=4, most=4, size=(5, 7), dtype=torch.float32):
    """Embeddings, pixels, targets and matches: some images have fewer targets, one of them has no query in one step."""
    embeddings, pixels = torch.randn(steps, batch, queries, channels), torch.randn(batch, channels, *size)
    matches = torch.stack([torch.randperm(max(queries, most))[:most] for _ in range(steps * batch)]).view(steps, batch, most)
    matches[matches >= queries] = -1
    matches[:, 1:, most // 2 :] = -1
    if most > 2:
        matches[0, 0, 1] = -1
    return embeddings.to(dtype), pixels.to(dtype), torch.rand(batch, most, *size), matches


def built(queries, pixels, targets, matches):
    """Every mask by itself."""
    bce, dice = [], []
    for step, image, place in torch.cartesian_prod(*(torch.arange(n) for n in matches.shape)).tolist():
        query = matches[step, image, place]
        logits = torch.einsum("c,chw->hw", queries[step, image, query], pixels[image]).flatten()[None]
        truth = targets[image, place].flatten()[None].to(logits.dtype)
        bce.append(F.binary_cross_entropy_with_logits(logits, truth) if query >= 0 else logits.new_zeros(()))
        dice.append(mask_dice(logits, truth)[0] if query >= 0 else logits.new_zeros(()))
    return torch.stack(bce).view(matches.shape), torch.stack(dice).view(matches.shape)


def in_pieces(monkeypatch, keep=True):
    """Let the registered op run whatever the size."""
    monkeypatch.setattr(mask_losses, "_worth_pieces", lambda *_: True)
    monkeypatch.setattr(mask_losses, "_HUGE", 2**26 if keep else 0)


FORMS = {
    "eager": lambda monkeypatch: None,
    "kept": in_pieces,
    "built again": lambda monkeypatch: in_pieces(monkeypatch, keep=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factored_losses_are_those_of_the_masks(monkeypatch, form, dtype):
    FORMS[form](monkeypatch)
    backend = "eager" if form == "eager" else "auto"
    queries, pixels, targets, matches = scene()
    assert_matches_reference(
        lambda q, v: matched_mask_losses(q, v, targets, matches, backend=backend),
        lambda q, v: built(q, v, targets, matches),
        [queries, pixels],
        dtype=dtype,
    )


@pytest.mark.usefixtures("pieces")
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 6)),
    st.booleans(),
    st.booleans(),
)
def test_every_size(sizes, keep, as_bool):
    steps, batch, queries, channels, most, side = sizes
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    query, pixels = torch.randn(steps, batch, queries, channels), torch.randn(batch, channels, side, 4)
    targets = torch.rand(batch, most, side, 4)
    targets = targets > 0.5 if as_bool else targets
    matches = torch.randint(-1, queries, (steps, batch, most))
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_pieces(monkeypatch, keep)
        assert_matches_reference(
            lambda q, v: matched_mask_losses(q, v, targets, matches),
            lambda q, v: matched_mask_losses(q, v, targets, matches, backend="eager"),
            [query, pixels],
        )


@pytest.mark.parametrize("form", FORMS)
def test_without_a_match_there_is_no_loss_and_no_gradient(monkeypatch, form):
    """Whatever query 0 holds, which such a place could stand for."""
    FORMS[form](monkeypatch)
    queries, pixels, targets, matches = scene()
    matches[matches == 0] = 1
    queries[:, :, 0] = math.nan
    queries.requires_grad_(), pixels.requires_grad_()
    bce, dice = matched_mask_losses(queries, pixels, targets, matches, backend="eager" if form == "eager" else "auto")
    assert (bce[matches < 0] == 0).all() and (dice[matches < 0] == 0).all()
    assert (bce[matches >= 0] > 0).all()
    for grad in torch.autograd.grad(bce.sum() + dice.sum(), (queries, pixels)):
        assert grad.isfinite().all()


def test_no_matches_still_reach_embeddings_and_pixels(monkeypatch):
    for most in (0, 3):
        for form in FORMS.values():
            form(monkeypatch)
            queries, pixels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(3, 5, 2, 2, requires_grad=True)
            matches = torch.full((2, 3, most), -1)
            bce, dice = matched_mask_losses(queries, pixels, torch.rand(3, most, 2, 2), matches)
            grads = torch.autograd.grad(bce.sum() + dice.sum(), (queries, pixels))
            assert all(grad.eq(0).all() and grad.shape == leaf.shape for grad, leaf in zip(grads, (queries, pixels), strict=True))


class _Made(TorchDispatchMode):
    """Elements of the largest tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_masks_without_a_match_are_not_built():
    rows, pixels, targets = torch.randn(2, 10, 3, 4), torch.randn(2, 4, 60, 60), torch.rand(2, 10, 60, 60)
    matched = torch.zeros(2, 10, 3, dtype=torch.bool)
    matched[1, :2] = True
    with _Made() as made:
        found = _matched_masks.compare_pieces(rows, pixels, targets, matched, False)
    assert 0 < made.largest <= targets.numel() < rows[..., 0].numel() * 3600  # only views of the targets are larger than 6 masks
    ones = torch.ones(2, 10, 3)
    with _Made() as made:
        _matched_masks.differentiate_pieces(ones, ones, rows, pixels, targets, matched, False, *found[2:], [True, True])
    assert made.largest <= targets.numel()


def test_long_rows_are_cut_into_pieces():
    rows, pixels, targets = torch.randn(1, 8, 8, 3), torch.randn(1, 3, 120, 120), torch.rand(1, 8, 120, 120)
    matched = torch.ones(1, 8, 8, dtype=torch.bool)
    with _Made() as made:
        found = _matched_masks.compare_pieces(rows, pixels, targets, matched, False)
    assert made.largest <= 2**19 < rows[..., 0].numel() * 14400 == 8 * targets.numel()
    want = matched_mask_losses(rows.permute(2, 0, 1, 3), pixels, targets, torch.arange(8).expand(8, 1, 8), backend="eager")
    torch.testing.assert_close(found[0], want[0].permute(1, 2, 0))
    torch.testing.assert_close(found[1], want[1].permute(1, 2, 0))


def test_the_form_follows_from_size_and_matches():
    def chosen(steps, batch, most, side, counts):
        matches = torch.full((steps, batch, most), -1)
        for image, count in enumerate(counts):
            matches[:, image, :count] = 0
        return mask_losses._worth_pieces(matches, torch.zeros(1).expand(batch, 1, side, side))

    assert chosen(10, 4, 10, 120, [1, 3, 5, 10])  # most masks are padding
    assert chosen(10, 1, 10, 120, [10])  # masks of one image are large
    assert not chosen(10, 2, 3, 120, [3, 3])
    assert not chosen(4, 8, 4, 16, [0, 1, 2, 3, 1, 2, 3, 4])


def test_dtypes_of_the_result():
    queries, pixels, targets, matches = scene(dtype=torch.bfloat16)
    assert matched_mask_losses(queries, pixels, targets, matches)[0].dtype == torch.bfloat16
    exact = matched_mask_losses(queries.double(), pixels.double(), targets, matches)
    for loss, want in zip(matched_mask_losses(queries, pixels, targets, matches, dtype=torch.float32), exact, strict=True):
        torch.testing.assert_close(loss, want.float())
    assert matched_mask_losses(queries.float(), pixels, targets, matches)[1].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
@pytest.mark.parametrize("keep", [True, False])
def test_the_registered_op_passes_pytorchs_own_checks(keep):
    rows, pixels = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    targets, matched = torch.rand(2, 3, 3, 5), torch.ones(2, 3, 2, dtype=torch.bool)
    rows.requires_grad_(), pixels.requires_grad_()
    torch.library.opcheck(torch.ops.gresbox.matched_mask_losses.default, (rows, pixels, targets, matched, keep))
    matched[1, 1:] = False
    assert torch.autograd.gradcheck(
        lambda rows, pixels: _matched_masks.compare_matched(rows, pixels, targets, matched, keep)[:2], (rows, pixels)
    )
    bce, dice = _matched_masks.compare_matched(rows, pixels.detach(), targets, matched, keep)[:2]
    (grad,) = torch.autograd.grad(dice.sum(), rows)
    assert grad.shape == rows.shape and not bce.isnan().any()


def test_it_compiles_without_a_look_at_the_matches():
    queries, pixels, targets, matches = scene(size=(40, 40), most=6, queries=9, steps=8, batch=8)
    assert mask_losses._worth_pieces(matches, pixels)

    def total(queries, pixels, matches):
        bce, dice = matched_mask_losses(queries, pixels, targets, matches)
        return bce.sum() + dice.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, pixels, matches), total(queries, pixels, matches))


def test_matches_may_be_batched_by_torch_func():
    queries, pixels, targets = torch.randn(1, 2, 4, 3), torch.randn(2, 3, 5, 6), torch.rand(2, 2, 5, 6)
    matches = torch.tensor([[[[0, 1], [2, -1]]], [[[3, 2], [-1, 0]]]])
    found = torch.func.vmap(lambda each: matched_mask_losses(queries, pixels, targets, each))(matches)
    one_by_one = [matched_mask_losses(queries, pixels, targets, each) for each in matches]
    wanted = [torch.stack(losses) for losses in zip(*one_by_one, strict=True)]
    torch.testing.assert_close(list(found), wanted)


def test_errors_of_matched_losses():
    queries, pixels, targets, matches = scene()
    with pytest.raises(ValueError, match=r"^matched_mask_losses: `targets` must be \(B, M, H, W\) with W=7, got \(2, 4, 5, 6\)\.$"):
        matched_mask_losses(queries, pixels, targets[..., 1:], matches)
    with pytest.raises(ValueError, match=r"`matches` must be \(S, B, M\) with S=3, got \(2, 2, 4\)"):
        matched_mask_losses(queries, pixels, targets, matches[1:])
    with pytest.raises(TypeError, match=r"`queries` must be a floating-point tensor, got torch\.int64"):
        matched_mask_losses(queries.long(), pixels, targets, matches)
    with pytest.raises(RuntimeError, match=r"^matched_mask_losses: backend='triton' is not possible here: "):
        matched_mask_losses(queries, pixels, targets, matches, backend="triton")
