"""Aggregation of masks: golden data, the chunked form against the definition, and the extremes of float32."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gresbox.ops import aggregate_masks, aggregate_queries, mask_dice
from gresbox.ops._aggregation_chunks import KEEP_BITS, KEEP_BYTES, KEEP_NOTHING, merge_pieces, unmerge_pieces
from gresbox.testing import assert_matches_reference

FORMS = ["prelu", "noisy_or", "select"]


@pytest.mark.parametrize("case", ["scalar", "zero_slope", "identity", "per_query", "saturated"])
def test_golden(golden, case):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("instalign_aia").items() if key.startswith(f"{case}/")}
    leaves = [data[name].requires_grad_() for name in ("score_logit", "mask_logit", "slope")]
    score_logit, masks, slope = leaves
    merged = aggregate_masks(masks, score_logit.sigmoid(), slope)
    torch.testing.assert_close(merged, data["z"], rtol=0, atol=1e-13)
    assert torch.equal(merged > 0, data["mask"])
    loss = F.binary_cross_entropy_with_logits(merged, data["gt"]) + mask_dice(merged.flatten(1), data["gt"].flatten(1)).mean()
    torch.testing.assert_close(loss, data["bce"] + data["dice"], rtol=0, atol=1e-13)
    for name, grad in zip(("score_logit", "mask_logit", "slope"), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(grad.reshape(data[f"grad_{name}"].shape), data[f"grad_{name}"], rtol=0, atol=1e-14)
    selected = aggregate_masks(masks, score_logit.sigmoid(), None, form="select")
    assert torch.equal(selected > 0, data["fixed_selection"])


@pytest.mark.usefixtures("pieces")
@given(
    st.sampled_from(FORMS),
    st.integers(0, 3),
    st.integers(0, 6),
    st.integers(0, 5),
    st.sampled_from([None, 1, 4, 1000]),
    st.booleans(),
)
def test_chunks_equal_the_definition(form, batch, queries, side, chunk, per_query):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    generator = torch.Generator().manual_seed(queries + 10 * side)
    shapes = [(batch, queries, 3), (batch, 3, side, 4), (batch, queries)]
    query, pixels, scores = (torch.randn(s, generator=generator, dtype=torch.float64) * 3 for s in shapes)
    scores = scores.sigmoid()
    slope = torch.rand(queries if per_query else (), generator=generator)
    bias = torch.tensor(0.3, dtype=torch.float64)

    def reference(query, pixels, scores, slope, bias):
        return aggregate_queries(query, pixels, scores, slope, bias=bias, form=form, backend="eager")

    def chunked(query, pixels, scores, slope, bias):
        return aggregate_queries(query, pixels, scores, slope, bias=bias, form=form, chunk=chunk)

    options = {"dtype": torch.float64, "grad": queries > 0}
    if form == "select":  # the definition's scores are outside the graph
        inputs = [query, pixels]
        with_scores = lambda f: lambda q, v: f(q, v, scores, None, bias)  # noqa: E731
        assert_matches_reference(with_scores(chunked), with_scores(reference), inputs, **options)
    elif form == "noisy_or":
        inputs = [query, pixels, scores]
        without_slope = lambda f: lambda q, v, p: f(q, v, p, None, bias)  # noqa: E731
        assert_matches_reference(without_slope(chunked), without_slope(reference), inputs, **options)
    else:
        assert_matches_reference(chunked, reference, [query, pixels, scores, slope, bias], **options)


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found = max([self.found, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("keep", [KEEP_NOTHING, KEEP_BYTES])
@pytest.mark.parametrize("form", FORMS)
def test_no_pass_holds_all_masks(form, keep):
    batch, queries, side = 2, 100, 128
    inputs = (torch.randn(batch, queries, 8), torch.randn(batch, 8, side, side), torch.rand(batch, queries))
    inputs += (torch.tensor(0.25) if form == "prelu" else None, form, 0, keep)
    with _Largest() as largest:
        merged, sides = merge_pieces(*inputs)
    assert merged.shape == (batch, side, side)
    with _Largest() as largest_backward:
        unmerge_pieces(merged, *inputs, sides, [True] * 4)
    everything = 4 * batch * queries * side * side
    assert 0 < largest.found <= everything / 4
    assert 0 < largest_backward.found <= everything / 4


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_for_the_gradient_is_small(form):
    batch, queries, side = 2, 100, 20
    leaves = [torch.randn(batch, queries, 8), torch.randn(batch, 8, side, side), torch.rand(batch, queries)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.untyped_storage().nbytes()) or x, lambda x: x):
        aggregate_queries(*(leaf.requires_grad_() for leaf in leaves), 0.25, form=form)
        kept, saved[:] = sorted(saved), []
        aggregate_queries(*(leaf.detach() for leaf in leaves), 0.25, form=form)
    inputs = sum(4 * leaf.numel() for leaf in leaves)
    assert sum(kept) <= inputs + 8 + (batch * queries * side * side if form == "prelu" else 0)
    assert not saved


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("keep", [KEEP_NOTHING, KEEP_BYTES, KEEP_BITS])
def test_however_the_sides_are_kept_gradients_are_equal(keep):
    """Bits are what kernels keep; a program exported where there are kernels may run where there are none."""
    shapes = [(2, 5, 3), (2, 3, 5, 8), (2, 5), (5,)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    merged, sides = torch.ops.gresbox.aggregate_queries(*leaves, "prelu", 0, keep)
    want = aggregate_queries(*leaves, backend="eager")
    torch.testing.assert_close(merged, want)
    weight = torch.randn(merged.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(merged, leaves, weight), torch.autograd.grad(want, leaves, weight))
    assert sides.shape == {KEEP_NOTHING: (0,), KEEP_BYTES: (2, 5, 40), KEEP_BITS: (2, 5, 2)}[keep]
    torch.library.opcheck(torch.ops.gresbox.aggregate_queries.default, (*(leaf.detach() for leaf in leaves), "prelu", 0, keep))


def _exact_noisy_or(scores: list[float], logits: list[float]) -> float:
    with mpmath.workdps(300):
        total = mpmath.mpf(0)
        for score, logit in zip(scores, logits, strict=True):
            total -= mpmath.log(1 - mpmath.mpf(score) / (1 + mpmath.exp(-mpmath.mpf(logit))))
        return float(mpmath.log(mpmath.expm1(total)))


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(
    ("scores", "logits"),
    [
        ([1.0], [200.0]),
        ([1.0], [-200.0]),
        ([0.5, 0.5], [300.0, -300.0]),
        ([1.0, 1.0, 1.0], [100.0, 100.0, 100.0]),
        ([1e-3, 1e-3], [100.0, 90.0]),
        ([1e-6] * 50, [-100.0] * 50),
        ([0.999999, 0.25], [30.0, -5.0]),
        ([0.01] * 100, [0.0] * 100),
        ([1e-20, 1.0], [5.0, -120.0]),
        ([1.0, 0.5], [-3e-5, 15.9]),
    ],
)
def test_noisy_or_is_exact_at_the_extremes(scores, logits, backend):
    score = torch.tensor([scores]).requires_grad_()
    query = torch.tensor(logits).view(1, -1, 1).requires_grad_()
    merged = aggregate_queries(query, torch.ones(1, 1, 1, 1), score, None, form="noisy_or", backend=backend)
    exact = _exact_noisy_or(score[0].tolist(), query.flatten().tolist())
    assert merged.item() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    grads = torch.autograd.grad(merged.sum(), (query, score))
    assert all(grad.isfinite().all() and (grad >= 0).all() for grad in grads)
    assert grads[0].sum() <= len(scores) + 1e-4


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_noisy_or_gradient_is_exact_at_the_extremes(backend):
    score = torch.tensor([[1.0, 0.7, 1e-5]]).requires_grad_()
    query = torch.tensor([-90.0, -120.0, 60.0]).view(1, -1, 1).requires_grad_()
    merged = aggregate_queries(query, torch.ones(1, 1, 1, 1), score, None, form="noisy_or", backend=backend)
    grads = torch.autograd.grad(merged.sum(), (query, score))
    for index in range(3):
        step = 1e-6
        for grad, which in ((grads[0].flatten(), "logit"), (grads[1].flatten(), "score")):
            scores, logits = score[0].double().tolist(), query.flatten().double().tolist()
            values = scores if which == "score" else logits
            size = step * abs(values[index])
            if which == "score" and values[index] == 1:
                continue  # there the derivative is a convention
            values[index] += size
            above = _exact_noisy_or(scores, logits)
            values[index] -= 2 * size
            below = _exact_noisy_or(scores, logits)
            assert grad[index].item() == pytest.approx((above - below) / (2 * size), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_scores_of_zero_and_one_stay_finite(form, backend):
    score = torch.tensor([[0.0, 1.0, 0.0]]).requires_grad_()
    query = (torch.randn(1, 3, 2) * 100).requires_grad_()
    merged = aggregate_queries(query, torch.randn(1, 2, 4, 4), score, 0.25, form=form, backend=backend)
    zero = aggregate_queries(query, torch.randn(1, 2, 4, 4), score * 0, 0.25, form=form, backend=backend)
    assert merged.isfinite().all()
    assert zero.isfinite().all()
    grads = torch.autograd.grad(merged.sum() + zero.sum(), (query, score), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_noisy_or_of_independent_masks_is_the_probability_of_at_least_one():
    masks, scores = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    missed = (1 - scores[..., None, None] * masks.sigmoid()).prod(1)
    torch.testing.assert_close(aggregate_masks(masks, scores, None, form="noisy_or").sigmoid(), 1 - missed)


def test_select_takes_the_largest_selected_logit():
    masks = torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1, 1).requires_grad_()
    merged = aggregate_masks(masks, torch.tensor([[0.5, 0.6, 0.9]]), None, form="select")
    assert merged.item() == 2
    assert torch.autograd.grad(merged.sum(), masks)[0].flatten().tolist() == [0, 0, 1]
    nothing = aggregate_masks(masks, torch.zeros(1, 3), None, form="select")
    assert nothing.item() == -10
    assert aggregate_masks(masks[:, :0], torch.zeros(1, 0), None, form="select").item() == -10


@given(st.sampled_from(FORMS), st.integers(1, 5))
def test_order_of_queries_and_batch_do_not_matter(form, queries):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    query, pixels, scores = torch.randn(3, queries, 4), torch.randn(3, 4, 3, 2), torch.rand(3, queries)
    slope, order = torch.rand(queries), torch.randperm(queries)
    merged = aggregate_queries(query, pixels, scores, slope, form=form)
    torch.testing.assert_close(aggregate_queries(query[:, order], pixels, scores[:, order], slope[order], form=form), merged)
    alone = aggregate_queries(query[1:2], pixels[1:2], scores[1:2], slope, form=form)
    torch.testing.assert_close(alone, merged[1:2])


def test_without_queries():
    masks, scores = torch.zeros(2, 0, 3, 4), torch.zeros(2, 0)
    assert (aggregate_masks(masks, scores, 0.25) == 0).all()
    assert (aggregate_masks(masks, scores, None, form="noisy_or") - math.log(1e-30)).abs().max() < 1e-4


def test_no_slope_is_the_identity_and_a_number_is_a_slope():
    masks, scores = torch.randn(1, 3, 2, 2), torch.rand(1, 3)
    torch.testing.assert_close(aggregate_masks(masks, scores, None), aggregate_masks(masks, scores, torch.ones(3)))
    torch.testing.assert_close(aggregate_masks(masks, scores, 0.1), aggregate_masks(masks, scores, torch.tensor([0.1])))


def test_errors():
    masks, scores = torch.zeros(2, 5, 3, 3), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"^aggregate_masks: `scores` must be \(B, N\) with N=5, got \(2, 4\)\.$"):
        aggregate_masks(masks, scores[:, :4], 0.25)
    with pytest.raises(ValueError, match=r"`slope` must be \(\) or \(N,\) with N=5, got \(4,\)\.$"):
        aggregate_masks(masks, scores, torch.zeros(4))
    with pytest.raises(ValueError, match=r"`form` must be one of 'prelu', 'noisy_or', 'select', got 'max'\.$"):
        aggregate_masks(masks, scores, None, form="max")
    with pytest.raises(ValueError, match=r"`bias` must be \(\), got \(5,\)\.$"):
        aggregate_masks(masks, scores, None, bias=torch.zeros(5))
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        aggregate_queries(torch.zeros(2, 5, 4), torch.zeros(2, 4, 3, 3), scores, None, chunk=0)
    with pytest.raises(
        RuntimeError, match="backend='triton' is not possible here: its kernel merges with form='prelu' and a slope"
    ):
        aggregate_queries(torch.zeros(2, 5, 4), torch.zeros(2, 4, 3, 3), scores, None, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' is not possible here: inputs are on cpu, not on one CUDA device"):
        aggregate_queries(torch.zeros(2, 5, 4), torch.zeros(2, 4, 3, 3), scores, 0.25, backend="triton")
