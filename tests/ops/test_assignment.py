"""Assignment against SciPy, and costs that break it."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gresbox.ops import assign


def _scipy(cost: torch.Tensor) -> list[int]:
    rows, columns = linear_sum_assignment(cost.double().numpy())
    result = [-1] * cost.shape[1]
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        result[column] = row
    return result


@pytest.mark.parametrize(
    ("file", "case"),
    [("m2f_matcher", case) for case in ("a", "more_gt", "sat", "one", "detr0", "detr1")]
    + [("instalign_matching", case) for case in ("a", "single", "more_gt", "equal", "tie_q0", "tie_q1")],
)
def test_golden(golden, file, case):
    data = golden(file)
    total = data.get(f"{case}/total", data.get(f"{case}/cost_total"))
    want = np.full(total.shape[1], -1)
    want[data[f"{case}/cols"]] = data[f"{case}/rows"]
    assert assign(torch.from_numpy(total)[None])[0].tolist() == want.tolist()


@given(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_equals_scipy_with_and_without_padding(batch, rows, columns, dtype):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    cost = torch.randn(batch, rows, columns).to(dtype)
    counts = torch.randint(0, columns + 1, (batch,))
    cost_padded = torch.where(torch.arange(columns) < counts[:, None, None], cost, torch.nan)
    matched = assign(cost_padded, counts)
    assert matched.shape == (batch, columns)
    assert matched.dtype == torch.int64
    for index, count in enumerate(counts.tolist()):
        expected = _scipy(cost[index, :, :count]) if rows and count else [-1] * count
        assert matched[index].tolist() == expected + [-1] * (columns - count)
    full = assign(cost)
    assert [row.tolist() for row in full] == [_scipy(c) if rows and columns else [-1] * columns for c in cost]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16 - 1))
def test_infinite_pairs_are_taken_only_where_nothing_else_is_left(rows, columns, pattern):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    bits = torch.tensor([(pattern >> i) & 1 for i in range(rows * columns)], dtype=torch.bool).view(rows, columns)
    cost = torch.where(bits, torch.inf, torch.rand(rows, columns, dtype=torch.float64) * 10)
    matched = assign(cost[None])[0].tolist()
    pairs = [(row, column) for column, row in enumerate(matched) if row >= 0]
    assert len(pairs) == min(rows, columns) == len({row for row, _ in pairs})

    def price(chosen):
        values = [cost[pair].item() for pair in chosen]
        return sum(v == float("inf") for v in values), sum(v for v in values if v != float("inf"))

    size = min(rows, columns)
    options = [
        price(zip(r, c, strict=True))
        for r in itertools.permutations(range(rows), size)
        for c in itertools.combinations(range(columns), size)
    ]
    assert price(pairs) == pytest.approx(min(options))


HOSTILE = {
    "all inf": torch.full((3, 2), torch.inf),
    "an inf row and column": torch.tensor([[torch.inf] * 3, [1, 2, torch.inf], [3, 1, torch.inf], [2, 2, torch.inf]]),
    "huge": torch.tensor([[3e38, -3e38], [1.0, 3e38], [-3e38, 0.0]]),
    "huge with inf": torch.tensor([[3e38, -3e38], [torch.inf, 3e38], [-3e38, torch.inf]]),
    "denormal": torch.full((3, 2), 1e-45),
    "equal": torch.zeros(4, 3),
    "more targets": torch.rand(2, 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_costs_give_a_complete_assignment(name):
    cost = HOSTILE[name]
    matched = assign(cost[None])[0]
    used = matched[matched >= 0].tolist()
    assert len(used) == len(set(used)) == min(cost.shape)
    assert max(used) < cost.shape[0]
    if cost.isfinite().all():
        assert matched.tolist() == _scipy(cost)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_nan_is_an_error_or_a_warning(bad):
    cost = torch.rand(3, 4, 2)
    cost[1, 2, 0] = bad
    message = (
        r"^assign: `cost` must be free of NaN and -inf \(nan='large' counts them as \+inf\), got some in problem 1 of the batch\.$"
    )
    with pytest.raises(ValueError, match=message):
        assign(cost)
    with pytest.warns(RuntimeWarning, match=r"NaN or -inf in 1 of the batch's problems, first 1; they count as \+inf"):
        matched = assign(cost, nan="large")
    assert matched[0].tolist() == _scipy(cost[0])
    assert matched[1, 0].item() != 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padding = torch.where(torch.arange(2) < 1, cost.flip(-1), torch.nan)  # not a real column: neither error nor warning
        assign(padding[1:2, :, :1].expand(1, 4, 1), torch.tensor([1]))
        assign(torch.full((1, 2, 2), torch.nan), torch.tensor([0]))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_warning_points_to_the_caller(backend):
    with pytest.warns(RuntimeWarning, match="NaN") as caught:
        assign(torch.full((1, 2, 2), torch.nan), nan="large", backend=backend)
    assert caught[0].filename == __file__


def test_all_nan_is_still_complete():
    with pytest.warns(RuntimeWarning, match="2 of the batch's problems"):
        matched = assign(torch.full((2, 3, 2), torch.nan), nan="large")
    assert all(len(set(row.tolist())) == 2 and (row >= 0).all() for row in matched)


@pytest.fixture
def adapter(monkeypatch):
    """The package, or where it is not installed one that answers in the same way."""
    try:
        import torch_linear_assignment  # noqa: F401
    except ImportError:
        module = types.ModuleType("torch_linear_assignment")
        module.__spec__ = importlib.machinery.ModuleSpec("torch_linear_assignment", None)

        def batch_linear_assignment(cost):
            assert cost.isfinite().all()
            return torch.tensor([_scipy(each.mT) for each in cost], dtype=torch.int64)

        module.batch_linear_assignment = batch_linear_assignment
        monkeypatch.setitem(sys.modules, "torch_linear_assignment", module)


@given(st.integers(0, 3), st.integers(0, 6), st.integers(0, 6))
def test_the_adapter_equals_scipy(adapter, batch, rows, columns):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    cost, counts = torch.randn(batch, rows, columns), torch.randint(0, columns + 1, (batch,))
    padded = torch.where(torch.arange(columns) < counts[:, None, None], cost, torch.nan)
    for options in ((cost, None), (padded, counts)):
        assert torch.equal(assign(*options, backend="torch_linear_assignment"), assign(*options))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_adapter_takes_hostile_costs(adapter, name):
    cost = HOSTILE[name]
    matched = assign(cost[None], backend="torch_linear_assignment")[0]
    used = matched[matched >= 0].tolist()
    assert len(used) == len(set(used)) == min(cost.shape)
    with pytest.raises(ValueError, match=r"got some in problem 0 of the batch\.$"):
        assign(torch.full((1, 2, 2), torch.nan), backend="torch_linear_assignment")


def test_a_missing_adapter_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gresbox.ops._backend.importlib.util.find_spec", lambda name: None)
    message = r"^assign: backend='torch_linear_assignment' is not possible here: it needs the package torch-linear-assignment; pip"
    with pytest.raises(ImportError, match=message):
        assign(torch.rand(1, 2, 2), backend="torch_linear_assignment")


def test_compiles_and_exports_as_one_node():
    torch._dynamo.reset()
    cost, counts = torch.rand(2, 5, 3, requires_grad=True), torch.tensor([3, 1])
    compiled = torch.compile(lambda c, n: assign(c * 2, n) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cost, counts), assign(cost, counts) + 1)

    class Wrapped(torch.nn.Module):
        def forward(self, cost, counts):
            return assign(cost, counts)

    program = torch.export.export(Wrapped(), (cost.detach(), counts))
    assert any("gresbox.assign" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(cost.detach(), counts), assign(cost, counts))


def test_errors():
    cost = torch.rand(2, 4, 3)
    with pytest.raises(ValueError, match=r"`num_targets` must be in \[0, M\] with M=3, got 1 to 4\.$"):
        assign(cost, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"`num_targets` must be in \[0, M\] with M=3, got -1 to 2\.$"):
        assign(cost, torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"`num_targets` must be \(B\) with B=2, got \(3,\)"):
        assign(cost, torch.tensor([1, 1, 1]))
    with pytest.raises(TypeError, match=r"`num_targets` must be integers, got torch\.float32"):
        assign(cost, torch.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match="`cost` must be a floating-point tensor"):
        assign(cost.long())
    with pytest.raises(ValueError, match="`nan` must be one of 'error', 'large', got 'ignore'"):
        assign(cost, nan="ignore")
    with pytest.raises(ValueError, match=r"`cost` must be \(B, N, M\), got \(4, 3\)"):
        assign(cost[0])
    with pytest.raises(RuntimeError, match=r"^assign: backend='triton' is not possible here: 200 x 300 is more than 1024 x 128\.$"):
        assign(torch.rand(1, 200, 300), backend="triton")
    assert torch.equal(assign(cost, backend="eager"), assign(cost))
