"""What the benchmarks compare: forms that lack a package, the references' solver, and steps on padded targets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are programs of the repository

from benchmarks.harness import as_list, attempt, not_installed, reason_of
from benchmarks.ops import deformable, mask_losses, object_text, phrase_alignment, point_selection
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


@pytest.mark.parametrize("case", deformable.ON["cpu"])
def test_locations_keep_from_where_their_gradients_jump(case):
    inputs = deformable.make_inputs(deformable.CASES[case], CPU, torch.float32, torch.Generator().manual_seed(0))
    sizes = torch.tensor(inputs["shapes"]).double()[:, None]
    pixels = inputs["locations"].double() * sizes - 0.5
    assert (pixels - pixels.round()).abs().min() > deformable.MARGIN / 2


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def calls_of(form, inputs, differentiable):
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in differentiable}
    with Calls() as calls:
        outputs = [out for out in as_list(form(**inputs)) if out.requires_grad]
        if outputs:
            torch.autograd.grad(sum(out.sum() for out in outputs), [inputs[name] for name in differentiable])
    return calls.names


@pytest.mark.parametrize(
    "module", [object_text, mask_losses, phrase_alignment, point_selection, deformable], ids=lambda m: m.__name__
)
def test_what_is_called_the_same_form_is(module):
    few = [case for case in module.ON["cpu"] if "2x" not in case and "4725" not in case]  # the others take long and are not it
    for case in few:
        inputs = module.make_inputs(module.CASES[case], CPU, torch.float32, torch.Generator().manual_seed(0))
        forms = module.forms("cpu")
        for direction in ("forward", "forward+backward") if module.DIFFERENTIABLE else ("forward",):
            gradients = module.DIFFERENTIABLE if direction != "forward" else ()
            ours, eager = (calls_of(forms[name], inputs, gradients) for name in ("gresbox", "eager"))
            rest = iter(ours)
            same = len(ours) <= len(eager) + 6 and all(name in rest for name in eager)  # six small calls may decide
            assert module.same_form(case, "cpu", direction) == same, (case, direction)
