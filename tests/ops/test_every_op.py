"""What every op promises: compiles, exports, ignores autocast, keeps its dtype, has right gradients, reads any strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import gresbox.ops as ops
from gresbox.ops import deformable, mask_losses, masked, object_text, point_sampling
from gresbox.testing import assert_matches_reference

VALID = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
SHAPES = [(3, 4), (2, 2)]


@dataclass
class Case:
    call: Callable[..., Any]
    inputs: list[Tensor]

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        out = self.call(*inputs)
        return [out] if isinstance(out, Tensor) else list(out)


def _rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_GENERATOR) * 0.8 + 0.1


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


def _boxes(count: int) -> Tensor:
    corner = _rand(count, 2)
    return torch.cat([corner, corner + _rand(count, 2)], dim=1)


_GENERATOR = torch.Generator().manual_seed(3)
_FACTORED = [_randn(2, 5, 6), _randn(2, 6, 4, 5), _rand(2, 5), torch.tensor(0.25)]
_MATCHED = torch.arange(120).view(2, 3, 4, 5) % 7 < 3, torch.tensor([[[4, 0, 2], [1, -1, -1]]])
_SAMPLED = [_randn(2, 16, 3, 4), _rand(2, 5, 3, 2, 2, 2), _rand(2, 5, 3, 2, 2)]
_MASKED = [_randn(2, 2, 5, 4), _randn(2, 2, 6, 4), _randn(2, 2, 6, 4), _randn(2, 5, 6) - 1.5]
_BOTH = [_randn(2, 2, 5, 3), *(_randn(2, 2, 4, 3) for _ in range(3)), *(_randn(2, 2, 5, 3) for _ in range(2))]
CASES = {
    "align_phrases": Case(lambda q, t: ops.align_phrases(q, t, VALID), [_randn(2, 5, 8), _randn(2, 4, 8)]),
    "align_phrases eager": Case(lambda q, t: ops.align_phrases(q, t, VALID, backend="eager"), [_randn(2, 5, 8), _randn(2, 4, 8)]),
    "aggregate_masks": Case(ops.aggregate_masks, [_randn(2, 5, 4, 3), _rand(2, 5), _rand(5)]),
    "aggregate_masks noisy_or": Case(
        lambda m, s: ops.aggregate_masks(m, s, None, form="noisy_or"), [_randn(2, 5, 4, 3), _rand(2, 5)]
    ),
    "aggregate_masks select": Case(lambda m: ops.aggregate_masks(m, _FACTORED[2], None, form="select"), [_randn(2, 5, 4, 3)]),
    "aggregate_queries": Case(ops.aggregate_queries, _FACTORED),
    "aggregate_queries per query": Case(
        lambda q, v, p, a, b: ops.aggregate_queries(q, v, p, a, bias=b, chunk=3), [*_FACTORED[:3], _rand(5), _randn(1)[0]]
    ),
    "aggregate_queries no slope": Case(lambda q, v, p: ops.aggregate_queries(q, v, p, None), _FACTORED[:3]),
    "aggregate_queries noisy_or": Case(lambda q, v, p: ops.aggregate_queries(q, v, p, None, form="noisy_or"), _FACTORED[:3]),
    "aggregate_queries select": Case(
        lambda q, v: ops.aggregate_queries(q, v, _FACTORED[2].to(q.dtype), None, form="select"), _FACTORED[:2]
    ),
    "aggregate_queries eager": Case(lambda *a: ops.aggregate_queries(*a, backend="eager"), _FACTORED),
    "pairwise_mask_cost": Case(lambda s: ops.pairwise_mask_cost(s, torch.arange(14).view(2, 7) % 3 == 0), [_randn(4, 7)]),
    "query_mask_cost": Case(
        lambda q, v: ops.query_mask_cost(q, v, torch.arange(120).view(2, 3, 4, 5) % 7 < 3, chunk=7), _FACTORED[:2]
    ),
    "query_mask_cost eager": Case(lambda q, v: ops.query_mask_cost(q, v, _MATCHED[0], backend="eager"), _FACTORED[:2]),
    "deformable_attention": Case(lambda v, x, w: ops.deformable_attention(v, SHAPES, x, w), _SAMPLED),
    "deformable_attention eager": Case(lambda v, x, w: ops.deformable_attention(v, SHAPES, x, w, backend="eager"), _SAMPLED),
    "match_patches": Case(
        lambda v, t, a, b: ops.match_patches(v, t, VALID, a, b, scale=3.0),
        [_randn(2, 5, 8), _randn(2, 4, 6), _randn(8, 7), _randn(6, 7)],
    ),
    "match_patches eager": Case(
        lambda v, t, a, b: ops.match_patches(v, t, VALID, a, b, scale=3.0, over="patches", normalize=False, backend="eager"),
        [_randn(2, 5, 8), _randn(2, 4, 6), _randn(8, 7) * 0.2, _randn(6, 7) * 0.2],
    ),
    "masked_attention": Case(ops.masked_attention, _MASKED),
    "masked_attention eager": Case(lambda *a: ops.masked_attention(*a, backend="eager"), _MASKED),
    "cross_attend_both": Case(lambda *a: ops.cross_attend_both(*a, VALID), _BOTH),
    "cross_attend_both eager": Case(lambda *a: ops.cross_attend_both(*a, VALID, backend="eager"), _BOTH),
    "point_sample": Case(ops.point_sample, [_randn(2, 3, 5, 4), _rand(2, 7, 2)]),
    "point_sample of many maps": Case(ops.point_sample, [_randn(2, 70, 5, 4), _rand(2, 7, 2)]),
    "mask_bce": Case(lambda s: ops.mask_bce(s, torch.arange(12).view(3, 4) % 2 == 0), [_randn(3, 4)]),
    "mask_dice": Case(lambda s: ops.mask_dice(s, torch.arange(12).view(3, 4) % 2 == 0), [_randn(3, 4)]),
    "matched_mask_losses": Case(
        lambda q, v: ops.matched_mask_losses(q.unflatten(1, (1, -1)).transpose(0, 1), v, *_MATCHED), _FACTORED[:2]
    ),
    "matched_mask_losses eager": Case(
        lambda q, v: ops.matched_mask_losses(torch.stack([q, q * 2]), v, _MATCHED[0], _MATCHED[1].expand(2, 2, 3), backend="eager"),
        _FACTORED[:2],
    ),
    "box_iou": Case(ops.box_iou, [_boxes(3), _boxes(4)]),
    "generalized_box_iou": Case(ops.generalized_box_iou, [_boxes(3), _boxes(4)]),
    "box_cxcywh_to_xyxy": Case(ops.box_cxcywh_to_xyxy, [_rand(2, 3, 4)]),
    "box_xyxy_to_cxcywh": Case(ops.box_xyxy_to_cxcywh, [_boxes(3)]),
}
BY_NAME = pytest.mark.parametrize("name", CASES)


def _leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.detach().clone().to(dtype).requires_grad_() for x in case.inputs]


def _grads(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(total, leaves, allow_unused=True)]


def test_every_op_has_a_case():
    tested_elsewhere = {"assign", "select_points", "stack_masks", "uncertain_points"}
    tested_elsewhere |= {"filter_blocks", "inner_tokens", "random_projections"}
    assert {name.split()[0] for name in CASES} | tested_elsewhere == set(ops.__all__)


@BY_NAME
def test_gradient_is_that_of_the_forward_pass(name):
    case = CASES[name]
    assert torch.autograd.gradcheck(lambda *x: tuple(case.run(list(x))), tuple(_leaves(case, torch.float64)))


FORMS = {  # sizes from which an op takes another form
    "as sized": (),
    "as if large": (
        (masked, "_MANY", -1),
        (deformable, "WORTH_IT", -1_000_000),
        (mask_losses, "_SMALL", 0),
        (mask_losses, "_LARGE", 0),
        (object_text, "MANY_AFFINITIES", 0),
        (point_sampling, "_MANY_MAPS", 1),
    ),
}
LACKING = "derivative for aten::grid_sampler_2d_backward is not implemented"  # PyTorch's own words, in older versions


@BY_NAME
@pytest.mark.parametrize("forms", FORMS)
def test_a_second_derivative_is_right_or_refused(name, forms, monkeypatch):
    for module, attribute, size in FORMS[forms]:
        monkeypatch.setattr(module, attribute, size)
    case = CASES[name]

    def gradients(*leaves):  # of a constant's product, as a gradient penalty makes them: nothing comes in that has a gradient
        outputs = case.run(list(leaves))
        total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
        found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        return tuple(gradient for gradient in found if gradient is not None)

    refused = ""
    try:
        # Where a gradient is said to have none, it must be a constant by finite differences as well.
        assert torch.autograd.gradcheck(gradients, tuple(_leaves(case, torch.float64)))
    except RuntimeError as error:
        refused = str(error)
    hint = f"{name.split()[0]}: the gradient has no gradient of its own here; use backend='eager' for a double backward."
    assert refused in (("", LACKING) if "eager" in name else ("", LACKING, hint))


OUTSIDE_TORCH_FUNC = ("aggregate_queries", "query_mask_cost")  # registered ops, which PyTorch does not let through


@BY_NAME
def test_it_may_be_checkpointed(name):
    case = CASES[name]
    leaves, kept = _leaves(case), _leaves(case)
    again = torch.utils.checkpoint.checkpoint(lambda *x: case.run(list(x)), *leaves, use_reentrant=False)
    torch.testing.assert_close(_grads(again, leaves), _grads(case.run(kept), kept), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own ops without a rule for torch.func.vmap
@BY_NAME
def test_torch_func_takes_the_gradient_of_each_and_of_a_batch(name):
    case = CASES[name]
    if name.startswith(OUTSIDE_TORCH_FUNC) and "eager" not in name:
        pytest.skip("PyTorch lets no registered op through torch.func.grad; backend='eager' goes")
    leaves = _leaves(case, torch.float64)
    inputs, places = [leaf.detach() for leaf in leaves], tuple(range(len(leaves)))

    def total(*inputs):
        outputs = case.run(list(inputs))
        return sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)

    found = torch.autograd.grad(total(*leaves), leaves, allow_unused=True, materialize_grads=True)
    gradient = torch.func.grad(total, argnums=places)
    torch.testing.assert_close(gradient(*inputs), found)
    doubled = torch.func.vmap(gradient)(*(torch.stack([x * 0.9, x]) for x in inputs))
    torch.testing.assert_close([each[1] for each in doubled], list(found))


@BY_NAME
def test_compiles_as_one_graph(name):
    case = CASES[name]
    torch._dynamo.reset()
    leaves, compiled_leaves = _leaves(case), _leaves(case)
    want = case.run(leaves)
    got = torch.compile(case.run, fullgraph=True, backend="aot_eager")(compiled_leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(_grads(got, compiled_leaves), _grads(want, leaves))


@BY_NAME
def test_exports(name):
    case = CASES[name]

    class Wrapped(torch.nn.Module):
        def forward(self, *inputs):
            return case.run(list(inputs))

    program = torch.export.export(Wrapped(), tuple(case.inputs), strict=False)
    torch.testing.assert_close(program.module()(*case.inputs), case.run(case.inputs))


@BY_NAME
def test_ignores_autocast(name):
    case = CASES[name]
    registered = name.startswith(("query_mask_cost", "aggregate_queries")) and "eager" not in name
    leaves = _leaves(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.run(leaves)
    # A backward pass belongs outside autocast; that of the registered ops is ours and bears it.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=registered):
        under_grads = _grads(under, leaves)
    plain_leaves = _leaves(case)
    plain = case.run(plain_leaves)
    assert all(out.dtype == torch.float32 for out in under)
    torch.testing.assert_close(under, plain, rtol=0, atol=0)
    torch.testing.assert_close(under_grads, _grads(plain, plain_leaves), rtol=0, atol=1e-6)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_and_accumulates_in_float32(name, dtype):
    case = CASES[name]
    assert all(out.dtype == dtype for out in case.run(_leaves(case, dtype)))
    assert_matches_reference(lambda *x: case.run(list(x)), lambda *x: case.run(list(x)), case.inputs, dtype=dtype)


@BY_NAME
def test_reads_any_strides_and_writes_no_input(name):
    case = CASES[name]
    scattered = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in case.inputs]
    turned = [x.flip(-1).mT.contiguous().mT.flip(-1) if x.ndim > 1 else x for x in case.inputs]
    for inputs in (scattered, turned):
        before = [x.clone() for x in inputs]
        torch.testing.assert_close(case.run(inputs), case.run(case.inputs))
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.slow
def test_inductor_compiles_the_factored_ops():
    queries, pixels, scores, slope = (x.clone().requires_grad_() for x in _FACTORED)
    targets = torch.rand(2, 3, 4, 5) > 0.5

    def both(queries, pixels, scores, slope):
        bce, dice = ops.query_mask_cost(queries, pixels, targets)
        rows = ops.assign(bce + dice)
        return ops.aggregate_queries(queries, pixels, scores, slope).sigmoid().sum() + rows.sum()

    torch._dynamo.reset()
    want = both(queries, pixels, scores, slope)
    got = torch.compile(both, fullgraph=True)(queries, pixels, scores, slope)
    torch.testing.assert_close(got, want)
    leaves = (queries, pixels, scores, slope)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
@pytest.mark.parametrize("form", ["prelu", "noisy_or", "select"])
def test_registered_ops_pass_pytorchs_own_checks(form):
    leaves = [x.clone().requires_grad_() for x in _FACTORED]
    torch.library.opcheck(torch.ops.gresbox.aggregate_queries.default, (*leaves, form, 3, 1))
    if form == "prelu":
        targets = torch.rand(2, 3, 4, 5) > 0.5
        torch.library.opcheck(torch.ops.gresbox.query_mask_cost.default, (*leaves[:2], targets, 7))
        torch.library.opcheck(torch.ops.gresbox.assign.default, (torch.rand(2, 4, 3), torch.tensor([3, 1]), False))
