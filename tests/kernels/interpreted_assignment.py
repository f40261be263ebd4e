"""The kernel of ``assign``, interpreted, against SciPy."""

from __future__ import annotations

import itertools
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gresbox.kernels import assignment as kernels
from gresbox.ops import assign

SECONDS = 20.0  # for one problem of at most 12 x 12: a hang, not slowness, is what breaks it


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernel leaves unwritten is far out of range."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **kwargs: empty(self, *args, **kwargs).fill_(99))


def by_scipy(cost: torch.Tensor) -> list[int]:
    rows, columns = linear_sum_assignment(cost.double().numpy())
    result = [-1] * cost.shape[1]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        result[column] = row
    return result


def solve(cost: torch.Tensor, counts: torch.Tensor | None = None, **options: str) -> torch.Tensor:
    started = time.monotonic()
    matched = assign(cost, counts, backend="triton", **options)
    assert time.monotonic() - started < SECONDS * cost.shape[0]
    return matched


def check_complete(matched: torch.Tensor, rows: int) -> None:
    used = [row for row in matched.tolist() if row >= 0]
    assert len(used) == len(set(used)) == min(rows, len(matched))
    assert all(0 <= row < rows for row in used)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (7, 3), (3, 7), (8, 8), (40, 6), (33, 2), (100, 10)])
def test_equals_scipy_at_odd_sizes(size):
    cost = torch.randn(2, *size)
    assert solve(cost).tolist() == [by_scipy(each) for each in cost]


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16), st.sampled_from(["plain", "near", "wide", "signed", "rank one"])
)
def test_equals_scipy_on_costs_without_ties(rows, columns, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, rows, columns, generator=generator)
    if kind == "near":  # all queries almost alike: many steps per target
        cost = cost * 1e-3 + torch.rand(1, 1, columns, generator=generator)
    elif kind == "wide":
        cost = (cost * 20 - 10).exp()
    elif kind == "signed":
        cost = cost * 2e4 - 1e4
    elif kind == "rank one":
        cost = cost * 1e-2 + torch.rand(1, rows, 1, generator=generator) * torch.rand(1, 1, columns, generator=generator)
    assert solve(cost)[0].tolist() == by_scipy(cost[0])


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**16), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_what_is_not_real_does_not_matter(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(3, rows, columns, generator=generator).to(dtype)
    counts = torch.randint(0, columns + 1, (3,), generator=generator)
    padded = torch.where(torch.arange(columns) < counts[:, None, None], cost, torch.nan)
    matched = solve(padded, counts)
    for index, count in enumerate(counts.tolist()):
        real = cost[index, :, :count]
        check_complete(matched[index, :count], rows)
        assert (matched[index, count:] == -1).all()
        value = sum(real[row, column].double() for column, row in enumerate(matched[index, :count].tolist()) if row >= 0)
        best = sum(real[row, column].double() for column, row in enumerate(by_scipy(real) if count else []) if row >= 0)
        assert value == best  # rounded costs may tie; the total may not differ


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16 - 1))
def test_infinite_pairs_are_taken_only_where_nothing_else_is_left(rows, columns, pattern):
    bits = torch.tensor([(pattern >> i) & 1 for i in range(rows * columns)], dtype=torch.bool).view(rows, columns)
    cost = torch.where(bits, torch.inf, torch.rand(rows, columns) * 10)
    matched = solve(cost[None])[0]
    check_complete(matched, rows)

    def price(pairs):
        values = [cost[pair].item() for pair in pairs]
        return sum(v == float("inf") for v in values), sum(v for v in values if v != float("inf"))

    size = min(rows, columns)
    options = [
        price(zip(r, c, strict=True))
        for r in itertools.permutations(range(rows), size)
        for c in itertools.combinations(range(columns), size)
    ]
    assert price([(row, column) for column, row in enumerate(matched.tolist()) if row >= 0]) == pytest.approx(min(options))


@pytest.mark.parametrize(
    "infinite", [[(0, 0)], [(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 0), (0, 1), (0, 2)], [(1, 1), (2, 1), (0, 2)]]
)
def test_sets_of_infinite_pairs(infinite):
    cost = torch.rand(4, 3)
    for pair in infinite:
        cost[pair] = torch.inf
    large = cost.nan_to_num(posinf=1e3)
    assert solve(cost[None])[0].tolist() == by_scipy(large)
    assert solve(cost.mT[None])[0].tolist() == by_scipy(large.mT)


ODD = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, -0.0, 1.0, 1e30])


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_hostile_costs_end_and_give_a_complete_assignment(rows, columns, data):
    values = data.draw(st.lists(ODD, min_size=rows * columns, max_size=rows * columns))
    cost = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matched = solve(cost[None], nan="large")[0]
        check_complete(matched, rows)
        same = assign(cost[None], nan="large", backend="eager")[0]
    total, best = (sum(cost[r, c].double() for c, r in enumerate(rows_of.tolist()) if r >= 0) for rows_of in (matched, same))
    if cost.isfinite().all():
        assert total == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("cost", [torch.zeros(6, 4), torch.ones(4, 6), torch.arange(20.0).view(5, 4) % 3], ids=["0", "1", "mod 3"])
def test_ties_end_at_the_smallest_total(cost):
    matched = solve(cost[None])[0]
    check_complete(matched, cost.shape[0])
    pairs = [(row, column) for column, row in enumerate(matched.tolist()) if row >= 0]
    rows, columns = linear_sum_assignment(cost.numpy())
    assert sum(cost[pair] for pair in pairs) == cost[rows, columns].sum()


def test_strides_and_counts_out_of_range():
    cost = torch.randn(3, 9, 4)
    want = [by_scipy(each) for each in cost]
    assert solve(cost.mT.contiguous().mT).tolist() == want
    assert solve(torch.stack([cost, cost], -1)[..., 1]).tolist() == want
    for counts in (torch.tensor(2).expand(3), torch.tensor([2, 0, 2, 0, 2])[::2]):  # read one after the other they would be others
        assert solve(cost, counts).tolist() == solve(cost, torch.tensor([2, 2, 2])).tolist()
    matched, _ = kernels.match(cost, torch.tensor([9, -3, 4]))
    assert matched.tolist() == [want[0], [-1] * 4, want[2]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_nan_is_an_error_or_a_warning(bad):
    cost = torch.rand(3, 4, 2)
    cost[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"^assign: `cost` must be free of NaN and -inf .* got some in problem 1 of the batch\.$"):
        solve(cost)
    with pytest.warns(RuntimeWarning, match=r"NaN or -inf in 1 of the batch's problems, first 1; they count as \+inf"):
        matched = solve(cost, nan="large")
    assert matched[0].tolist() == by_scipy(cost[0])
    assert matched[1, 0].item() != 2
    solve(torch.where(torch.arange(2) < 1, cost.flip(-1), torch.nan), torch.ones(3, dtype=torch.int64))  # only in what is not real


def test_what_the_kernel_does_not_take_goes_to_scipy_and_says_why():
    cost = torch.rand(1, 130, 129)
    assert assign(cost)[0].tolist() == by_scipy(cost[0])
    with pytest.raises(RuntimeError, match=r"backend='triton' is not possible here: 130 x 129 is more than 1024 x 128\.$"):
        assign(cost, backend="triton")
    with pytest.raises(RuntimeError, match=r"some input is float64 and kernels compute in float32\.$"):
        assign(cost.double()[:, :5, :5], backend="triton")
    assert assign(torch.rand(2, 0, 3)).tolist() == [[-1] * 3] * 2
    assert assign(torch.rand(2, 3, 0)).shape == (2, 0)
    assert assign(torch.rand(0, 3, 2)).shape == (0, 2)
