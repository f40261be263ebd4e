"""What the benchmarks compare: forms that lack a package, the references' solver, and steps on padded targets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are programs of the repository

from benchmarks.harness import attempt, not_installed, reason_of
from benchmarks.peers.mask2former import assign_exactly, solve
from benchmarks.step import criterion, matcher

CPU = torch.device("cpu")


def needs_gone():
    import no_such_package.part  # noqa: F401


def test_a_package_that_is_not_there_is_told_from_a_broken_one():
    with pytest.raises(ModuleNotFoundError) as lack:
        needs_gone()
    assert not_installed(lack.value) == "no_such_package is not installed"
    extra = ImportError("square: it needs an extra; pip install no-such-package")
    extra.__context__ = lack.value
    assert not_installed(extra) == "no_such_package is not installed"
    with pytest.raises(ModuleNotFoundError) as broken:
        import gresbox.ops.no_such_part  # noqa: F401
    assert not_installed(broken.value) is None
    later = ValueError("another failure, seen while that one was handled")
    later.__context__ = lack.value
    assert not_installed(later) is None
    assert attempt(needs_gone) == "no_such_package is not installed"
    assert attempt(lambda: len) is len
    assert reason_of(ValueError("inductor raised:\nno compiler\nat all")) == "inductor raised: no compiler"
    assert reason_of(ValueError()) == "ValueError"


def test_the_exact_assignment_of_the_references():
    from scipy.optimize import linear_sum_assignment

    for seed in range(30):
        cost = torch.randn(1 + seed % 9 + 4, seed % 5, generator=torch.Generator().manual_seed(seed)).double()
        cost = cost.round() if seed % 3 == 0 else cost
        rows = assign_exactly(cost.numpy())
        best, columns = linear_sum_assignment(cost)
        assert len(set(rows.tolist())) == cost.shape[1]
        assert cost[rows, range(cost.shape[1])].sum() == pytest.approx(cost[best, columns].sum().item())


def test_the_references_solve_without_scipy(monkeypatch):
    cost = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    with_scipy = dict(zip(*(part.tolist() for part in reversed(solve(cost))), strict=True))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    rows, columns = solve(cost)
    assert dict(zip(columns.tolist(), rows.tolist(), strict=True)) == with_scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 5])  # of five images the first has no target
def test_a_step_finds_the_same_on_targets_that_a_graph_can_be_captured_with(dtype, batch):
    case = {"S": 3, "B": batch, "N": 20, "C": 16, "H": 24, "L": 6, "image": 96}
    for module in (matcher, criterion):
        inputs = module.make_inputs(case, CPU, dtype, torch.Generator().manual_seed(0))
        forms = module.forms("cuda")
        ours = {name: forms[name].call(**forms[name].prepare(**inputs)) for name in ("gresbox", "gresbox, padded targets")}
        listed, padded = ours.values()
        if module is matcher:
            assert matcher.error([padded], [matcher.reference(**inputs)], inputs) <= 1e-6
            together = matcher.price_at_once(**{k: v for k, v in matcher.as_tensors(**inputs).items() if k != "counts"})
            worst = [
                (cost[:, : right.shape[1]] - right).abs().max().item()
                for of_images, costs in zip(together.double(), matcher.costs(**inputs), strict=True)
                for cost, right in zip(of_images, costs, strict=True)
                if right.shape[1]
            ]
            assert max(worst) < (1e-4 if dtype == torch.float32 else 2e-2)
            assert (padded[..., listed.shape[-1] :] == -1).all()
            padded = padded[..., : listed.shape[-1]]
        torch.testing.assert_close(padded, listed)
