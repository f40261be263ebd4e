"""Pairwise mask costs: golden data, every pair one by one, and the factored form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gresbox.ops import mask_bce, mask_dice, pairwise_mask_cost, query_mask_cost
from gresbox.ops.mask_costs import price_chunks, unprice_chunks
from gresbox.testing import assert_matches_reference


@pytest.mark.parametrize(
    ("file", "case", "masks", "targets"),
    [("m2f_matcher", case, "logits", "targets") for case in ("a", "more_gt", "sat", "one")]
    + [("instalign_matching", case, "mask_logit", "gt") for case in ("a", "single", "none", "more_gt", "equal")],
)
def test_golden(golden, file, case, masks, targets):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden(file).items() if key.startswith(f"{case}/")}
    bce, dice = pairwise_mask_cost(data[masks], data[targets])
    torch.testing.assert_close(bce, data["cost_bce"], rtol=0, atol=1e-13)
    torch.testing.assert_close(dice, data["cost_dice"], rtol=0, atol=1e-13)
    identity = torch.eye(data[masks].shape[0], dtype=torch.float64)[None]
    factored = query_mask_cost(identity, data[masks][None, :, None], data[targets][None, :, None], chunk=9)
    torch.testing.assert_close(factored[0][0], data["cost_bce"], rtol=0, atol=1e-13)
    torch.testing.assert_close(factored[1][0], data["cost_dice"], rtol=0, atol=1e-13)


@given(st.integers(0, 4), st.integers(0, 3), st.integers(1, 9), st.sampled_from([1.0, 200.0]))
def test_equals_the_losses_of_every_pair(queries, targets, pixels, scale):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks, truth = torch.randn(queries, pixels, dtype=torch.float64) * scale, torch.rand(targets, pixels) > 0.5
    bce, dice = pairwise_mask_cost(masks, truth)
    assert bce.shape == dice.shape == (queries, targets)
    for row in range(queries):
        for column in range(targets):
            pair = masks[row, None], truth[column, None]
            torch.testing.assert_close(bce[row, column], mask_bce(*pair)[0])
            torch.testing.assert_close(dice[row, column], mask_dice(*pair)[0])


@pytest.mark.usefixtures("pieces")
@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4), st.sampled_from([None, 1, 5, 100]))
def test_factored_equals_the_built_masks(batch, queries, targets, chunk):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    query, pixels = torch.randn(batch, queries, 3), torch.randn(batch, 3, 4, 5)
    truth = torch.rand(batch, targets, 4, 5) > 0.5

    def built(query, pixels):
        masks = (query @ pixels.flatten(2)).unbind(0)
        costs = [torch.stack(pairwise_mask_cost(m, t)) for m, t in zip(masks, truth.flatten(2), strict=True)]
        return torch.stack(costs, dim=1) if costs else query.new_zeros(2, 0, queries, targets) + 0 * query.sum()

    def factored(query, pixels):
        return torch.stack(query_mask_cost(query, pixels, truth, chunk=chunk))

    assert_matches_reference(factored, built, [query, pixels], grad=batch > 0)


def test_padded_targets_change_no_other_cost():
    query, pixels, truth = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    padded = torch.cat([truth, torch.zeros(2, 2, 4, 4)], dim=1)
    for plain, more in zip(query_mask_cost(query, pixels, truth), query_mask_cost(query, pixels, padded), strict=True):
        torch.testing.assert_close(more[..., :3], plain)


class _Largest(TorchDispatchMode):
    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_pass_holds_all_masks_or_all_pairs():
    query, pixels, truth = torch.randn(4, 100, 8), torch.randn(4, 8, 96, 96), torch.rand(4, 7, 96, 96) > 0.5
    with _Largest() as forward:
        bce, dice, *kept = price_chunks(query, pixels, truth, 0)
    with _Largest() as backward:
        unprice_chunks(bce, dice, query, pixels, truth, 0, *kept, [True, True])
    assert 0 < forward.values <= 4 * 100 * 96 * 96 / 4
    assert 0 < backward.values <= 4 * 100 * 96 * 96 / 4
    with _Largest() as pairwise:
        pairwise_mask_cost(torch.randn(40, 96 * 96), truth[0].flatten(1))
    assert pairwise.values <= 40 * 96 * 96


def test_errors():
    with pytest.raises(ValueError, match=r"^pairwise_mask_cost: `targets` must be \(M, P\) with P=7, got \(3, 6\)\.$"):
        pairwise_mask_cost(torch.zeros(2, 7), torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"`targets` must be \(B, M, H, W\) with W=5, got \(1, 2, 4, 4\)"):
        query_mask_cost(torch.zeros(1, 3, 2), torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match=r"`masks` must be a floating-point tensor, got torch\.bool"):
        pairwise_mask_cost(torch.zeros(2, 7, dtype=torch.bool), torch.zeros(3, 7))
