"""Deformable attention against the original implementation's numbers and a sum written out by hand, in all its forms."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from gresbox.ops import deformable, deformable_attention
from gresbox.testing import assert_matches_reference, relative_error

SHAPES = [(3, 4), (2, 2), (1, 5)]  # 21 pixels


def by_op(value, shapes, locations, weights, *, softmax=False):
    """The registered op, which behind the CPU's key is plain PyTorch."""
    return torch.ops.gresbox.deformable_attention(value, [side for shape in shapes for side in shape], locations, weights, softmax)


def by_corners(value, shapes, locations, weights, *, softmax=False):
    """What "auto" takes for many samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable, "WORTH_IT", -math.inf)
        return deformable_attention(value, shapes, locations, weights, softmax=softmax)


def by_definition(value, shapes, locations, weights, *, softmax=False):
    return deformable_attention(value, shapes, locations, weights, softmax=softmax, backend="eager")


FORMS = {"eager": by_definition, "auto": deformable_attention, "corners": by_corners, "op": by_op}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
fast_forms = pytest.mark.parametrize("form", [by_corners, by_op], ids=["corners", "op"])


def random_inputs(shapes=SHAPES, *, batch=2, queries=5, heads=3, channels=4, points=2, dtype=torch.float64, beyond=0.3):
    pixels, levels = sum(height * width for height, width in shapes), len(shapes)
    value = torch.randn(batch, pixels, heads, channels, dtype=dtype)
    locations = torch.rand(batch, queries, heads, levels, points, 2, dtype=dtype) * (1 + 2 * beyond) - beyond
    return value, locations, torch.randn(batch, queries, heads, levels, points, dtype=dtype)


def gradients(form, value, shapes, locations, weights, grad, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    out = form(leaves[0], shapes, *leaves[1:], **options)
    return out, torch.autograd.grad(out, leaves, grad)


@each_form
@pytest.mark.parametrize("case", ["inside", "outside", "single_1x1", "non_pow2", "edges"])
def test_golden(golden, case, form):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("m2f_msda").items() if key.startswith(f"{case}/")}
    inputs = [data[name] for name in ("value", "sampling_locations", "attention_weights")]
    shapes = [tuple(shape) for shape in data["spatial_shapes"].tolist()]
    out, grads = gradients(form, inputs[0], shapes, *inputs[1:], data["grad_output"])
    torch.testing.assert_close(out, data["output"], rtol=0, atol=1e-14)
    for name, grad in zip(("value", "sampling_locations", "attention_weights"), grads, strict=True):
        torch.testing.assert_close(grad, data[f"grad_{name}"], rtol=0, atol=1e-13)


def _by_hand(value, shapes, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    start = 0
    for level, (height, width) in enumerate(shapes):
        for b, q, h, k in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads, points))).tolist():
            x, y = (locations[b, q, h, level, k] * torch.tensor([width, height]) - 0.5).tolist()
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, level, k]
                        out[b, q, h] += share * value[b, start + row * width + column, h]
        start += height * width
    return out.flatten(2)


sides = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(st.integers(1, 2), st.integers(1, 2), st.lists(sides, min_size=1, max_size=2), st.booleans())
def test_equals_the_sum_by_hand(batch, heads, shapes, softmax):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    value, locations, weights = random_inputs(shapes, batch=batch, queries=2, heads=heads, channels=3)
    shares = weights.flatten(-2).softmax(-1).view_as(weights) if softmax else weights
    want = _by_hand(value, shapes, locations, shares)
    for form in FORMS.values():
        torch.testing.assert_close(form(value, shapes, locations, weights, softmax=softmax), want)


@fast_forms
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"shapes": [(1, 1)], "batch": 1, "queries": 1, "heads": 1, "channels": 1, "points": 1},
        {"shapes": [(7, 5), (1, 1), (5, 1), (1, 6)], "queries": 13, "heads": 2, "channels": 7, "points": 3},
        {"shapes": [(12, 9)], "batch": 3, "queries": 37, "heads": 1, "channels": 33, "points": 5, "beyond": 2.0},
    ],
    ids=["usual", "one of all", "odd", "mostly outside"],
)
def test_matches_the_definition(sizes, dtype, softmax, form):
    shapes = sizes.get("shapes", SHAPES)

    def ours(value, locations, weights):
        out = form(value, shapes, locations, weights, softmax=softmax)
        assert out.dtype == value.dtype and out.is_contiguous()
        return out

    def definition(value, locations, weights):
        return by_definition(value, shapes, locations, weights, softmax=softmax)

    assert_matches_reference(ours, definition, random_inputs(**sizes), dtype=dtype)


@each_form
def test_dtypes_may_differ(form):
    value, locations, weights = random_inputs()
    want = by_definition(value.bfloat16().double(), SHAPES, locations, weights.half().double())
    out, grads = gradients(form, value.bfloat16(), SHAPES, locations.float(), weights.half(), torch.ones_like(want).bfloat16())
    assert [out.dtype, *(grad.dtype for grad in grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    assert relative_error(out, want) < 5e-3  # of a bfloat16's last bit


def on_the_border(shapes):
    """Locations on pixels' centres, borders and just outside of each level, every x with every y."""
    levels = []
    for height, width in shapes:
        x, y = (torch.arange(-2, 2 * side + 3, dtype=torch.float64) / 2 / side for side in (width, height))
        levels.append(torch.cartesian_prod(x, y))
    count = max(len(level) for level in levels)
    places = [level.repeat(-(-count // len(level)), 1)[:count] for level in levels]
    return torch.stack(places, 1)[None, :, None, :, None]  # (1, count, 1, levels, 1, 2)


@fast_forms
def test_on_borders_and_centres_gradients_are_those_of_the_definition(form):
    shapes = [(2, 4), (1, 2), (4, 1), (1, 1), (8, 2)]  # halves of these are exact numbers
    locations = on_the_border(shapes)
    value = torch.randn(1, sum(height * width for height, width in shapes), 1, 3, dtype=torch.float64)
    weights = torch.randn(locations.shape[:-1], dtype=torch.float64)
    grad = torch.randn(1, locations.shape[1], 3, dtype=torch.float64)
    got, got_grads = gradients(form, value, shapes, locations, weights, grad)
    want, want_grads = gradients(by_definition, value, shapes, locations, weights, grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, want_grads)


@fast_forms
def test_far_away_and_no_number(form):
    value, locations, weights = random_inputs(dtype=torch.float32)
    clean = form(value, SHAPES, locations, weights)
    for place in (1e3, -1e5, 3e38, math.inf, -math.inf):
        moved = locations.clone()
        moved[0, 1], moved[0, 3, ..., 1] = place, place
        out, grads = gradients(form, value, SHAPES, moved, weights, torch.ones_like(clean))
        assert not out[0, 1].any() and not out[0, 3].any()  # seen from there nothing is
        assert all(grad.isfinite().all() for grad in grads)
        torch.testing.assert_close(out[1], clean[1])
    locations[0, 1, 0] = math.nan
    out = form(value, SHAPES, locations, weights)
    assert out[0, 1, :4].isnan().all() and out.isnan().sum() == 4


@fast_forms
def test_reads_any_strides(form):
    value, locations, weights = random_inputs()
    grad = torch.randn(2, 5, 12, dtype=torch.float64)
    want, want_grads = gradients(form, value, SHAPES, locations, weights, grad)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (value, locations, weights)]
    got = form(turned[0], SHAPES, *turned[1:])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in turned]
    grads = torch.autograd.grad(form(leaves[0], SHAPES, *leaves[1:]), leaves, grad.mT.contiguous().mT)
    torch.testing.assert_close(grads, want_grads)
    locations, weights = (x[:1].expand_as(x) for x in (locations, weights))
    torch.testing.assert_close(form(value[:1].expand_as(value), SHAPES, locations, weights), want[:1].expand_as(want))


@fast_forms
def test_only_needed_gradients_are_made(form):
    inputs = random_inputs()
    grad = torch.randn(2, 5, 12, dtype=torch.float64)
    _, want = gradients(form, inputs[0], SHAPES, *inputs[1:], grad)
    for index in range(3):
        leaves = [x.detach().clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        form(leaves[0], SHAPES, *leaves[1:]).backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(3)]
        torch.testing.assert_close(leaves[index].grad, want[index])


@fast_forms
def test_there_is_no_double_backward(form):
    leaves = [x.requires_grad_() for x in random_inputs()]
    (grad,) = torch.autograd.grad(form(leaves[0], SHAPES, *leaves[1:]).sum(), leaves[1:2], create_graph=True)
    message = r"^deformable_attention: the gradient has no gradient of its own here; use backend='eager' for a double backward\.$"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


@pytest.mark.parametrize("softmax", [False, True])
def test_gradcheck(softmax):
    leaves = [x.requires_grad_() for x in random_inputs([(3, 4), (2, 1)], batch=1, queries=3, heads=2, channels=2)]
    for form in (by_corners, by_op):
        shapes = [(3, 4), (2, 1)]
        assert torch.autograd.gradcheck(lambda v, x, w, form=form, s=shapes: form(v, s, x, w, softmax=softmax), leaves)


@each_form
def test_queries_and_images_are_independent(form):
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = torch.randn(3, 16, 2, 4), torch.rand(3, 5, 2, 2, 3, 2), torch.rand(3, 5, 2, 2, 3)
    out = form(value, shapes, locations, weights)
    order = torch.randperm(5)
    torch.testing.assert_close(form(value, shapes, locations[:, order], weights[:, order]), out[:, order])
    torch.testing.assert_close(form(value[1:2], shapes, locations[1:2], weights[1:2]), out[1:2])


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_empty(backend):
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = torch.randn(3, 16, 2, 4), torch.rand(3, 5, 2, 2, 3, 2), torch.rand(3, 5, 2, 2, 3)

    def run(*inputs):
        return deformable_attention(inputs[0], shapes, *inputs[1:], backend=backend)

    assert run(value, locations[:, :0], weights[:, :0]).shape == (3, 0, 8)
    assert run(value[:0], locations[:0], weights[:0]).shape == (0, 5, 8)
    assert run(value[..., :0], locations, weights).shape == (3, 5, 0)
    assert not run(value, locations[..., :0, :], weights[..., :0]).any()
    assert deformable_attention(value[:, :0], [], locations[:, :, :, :0], weights[:, :, :, :0], backend=backend).shape == (3, 5, 8)


def test_the_form_is_chosen_by_size():
    def many(batch, queries, side=60, channels=32):
        value = torch.empty(batch, side**2, 8, channels)
        return deformable._many_samples(value, torch.empty(batch, queries, 8, 3, 4, 2, device="meta"))

    assert many(1, 4725) and many(8, 100) and many(1, 100) and many(4, 1)
    assert not many(1, 10) and not many(2, 10, side=4, channels=8)
    assert not many(1, 1 << 25)  # more corners than an int32 counts
    assert not deformable._many_samples(torch.empty(1, 3600, 8, 32, device="meta"), torch.empty(1, 4725, 8, 3, 4, 2, device="meta"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
@pytest.mark.parametrize("softmax", [False, True])
def test_the_registered_op_passes_pytorchs_own_checks(softmax):
    value, locations, weights = (x.requires_grad_() for x in random_inputs())
    sides = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(torch.ops.gresbox.deformable_attention.default, (value, sides, locations, weights, softmax))
    arguments = [x.detach() for x in (value, locations, weights)]
    grad = torch.randn(2, 5, 12, dtype=torch.float64)
    inputs = (grad, arguments[0], sides, *arguments[1:], softmax, [True, False, True])
    torch.library.opcheck(torch.ops.gresbox.deformable_attention_backward.default, inputs)


@pytest.mark.parametrize("form", [by_definition, deformable_attention, by_op], ids=["eager", "auto", "op"])
def test_compiles_as_one_graph_also_with_other_sizes(form):
    torch._dynamo.reset()

    def run(value, locations, weights):
        return form(value, SHAPES, locations, weights, softmax=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for batch, queries in ((6, 7), (5, 9), (8, 10)):  # no two sizes of the first are equal, or they would be one symbol
        inputs = random_inputs(batch=batch, queries=queries, dtype=torch.float32)
        leaves, plain = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        got, want = compiled(*leaves), run(*plain)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), plain))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_it():
    torch._dynamo.reset()
    inputs = random_inputs(dtype=torch.float32)
    leaves, plain = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    want = by_definition(plain[0], SHAPES, *plain[1:])
    got = torch.compile(lambda v, x, w: deformable_attention(v, SHAPES, x, w), fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), plain))


class Wrapped(torch.nn.Module):
    def forward(self, value, locations, weights):
        return deformable_attention(value, SHAPES, locations, weights, softmax=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_exports_with_any_number_of_queries(strict, trained):
    inputs = tuple(x.requires_grad_(trained) for x in random_inputs(dtype=torch.float32))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("queries")}
    shapes = ({0: free[0]}, free, free)
    program = torch.export.export(Wrapped(), inputs, dynamic_shapes=shapes, strict=strict)
    others = random_inputs(batch=3, queries=9, dtype=torch.float32)
    want = by_definition(others[0], SHAPES, *others[1:], softmax=True)
    torch.testing.assert_close(program.module()(*others), want)


def test_fake_tensors():
    with FakeTensorMode():
        value, locations, weights = random_inputs(dtype=torch.bfloat16)
        for form in (by_op, by_corners, by_definition):
            out = form(value, SHAPES, locations, weights)
            assert (tuple(out.shape), out.dtype) == ((2, 5, 12), torch.bfloat16)


def test_errors():
    value, locations, weights = torch.zeros(1, 16, 2, 4), torch.zeros(1, 5, 2, 2, 3, 2), torch.zeros(1, 5, 2, 2, 3)
    with pytest.raises(ValueError, match=r"`spatial_shapes` must be 2 levels with 16 pixels in all, got \[\(3, 4\), \(2, 3\)\]\.$"):
        deformable_attention(value, [(3, 4), (2, 3)], locations, weights)
    with pytest.raises(ValueError, match=r"`weights` must be \(B, Q, heads, levels, points\) with points=3, got"):
        deformable_attention(value, [(3, 4), (2, 2)], locations, weights[..., :2])
    shapes = [(3, 4), (2, 2)]
    with pytest.raises(ValueError, match=r"^deformable_attention: `backend` must be .*'deformops'.*, got 'cuda'\.$"):
        deformable_attention(value, shapes, locations, weights, backend="cuda")
    with pytest.raises(RuntimeError, match=r"^deformable_attention: backend='triton' is not possible here: "):
        deformable_attention(value, shapes, locations, weights, backend="triton")


@pytest.mark.skipif(importlib.util.find_spec("deformops") is not None, reason="deformops is installed")
def test_the_adapter_names_its_package():
    value, locations, weights = random_inputs()
    with pytest.raises(ImportError, match=r"backend='deformops' is not possible here: it needs the package deformops.*\.$"):
        deformable_attention(value, SHAPES, locations, weights, backend="deformops")


@pytest.mark.skipif(importlib.util.find_spec("deformops") is None, reason="deformops is not installed")
@pytest.mark.parametrize("softmax", [False, True])
def test_the_adapter_agrees(softmax):
    def adapted(value, locations, weights):
        return deformable_attention(value, SHAPES, locations, weights, softmax=softmax, backend="deformops")

    def definition(value, locations, weights):
        return by_definition(value, SHAPES, locations, weights, softmax=softmax)

    assert_matches_reference(adapted, definition, random_inputs())


def test_the_adapter_gives_the_package_what_it_asks_for(monkeypatch):
    """With a stand-in for the package, which cannot be installed for every version of Python."""
    calls = []

    def msda(value, sizes, starts, locations, weights, *, method):
        calls.append((sizes.tolist(), starts.tolist(), weights.dtype, method))
        return by_definition(value, [tuple(size) for size in sizes.tolist()], locations, weights, softmax=method == "softmax")

    package, registry = type(sys)("deformops"), type(sys)("deformops.registry")
    registry.msda = msda
    monkeypatch.setitem(sys.modules, "deformops", package)
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    monkeypatch.setattr("gresbox.ops._backend.why_not_adapter", lambda name: None)
    value, locations, weights = random_inputs(dtype=torch.float32)
    for softmax in (False, True):
        got = deformable_attention(value.bfloat16(), SHAPES, locations, weights, softmax=softmax, backend="deformops")
        want = by_definition(value.bfloat16(), SHAPES, locations, weights.bfloat16(), softmax=softmax)
        torch.testing.assert_close(got, want)
    expected = [[3, 4], [2, 2], [1, 5]], [0, 12, 16], torch.bfloat16
    assert calls == [(*expected, "linear"), (*expected, "softmax")]
