"""The kernels of deformable_attention, interpreted: outputs and all gradients against float64, and what must not be written."""

from __future__ import annotations

import math

import pytest
import torch

from gresbox.kernels import deformable as kernels
from gresbox.ops import deformable, deformable_attention
from gresbox.testing import TOLERANCES, assert_matches_reference, relative_error

SHAPES = [(3, 4), (1, 2)]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The launches; what they are to write starts as NaN, so that what is not written is seen."""
    found = []

    def watch(name, outputs):
        prepare = getattr(kernels, name)

        def watched(*args):
            launch = prepare(*args)
            for output in outputs:
                if launch.arguments[output] is not launch.arguments.get("grad"):
                    launch.arguments[output].fill_(math.nan)
            found.append(launch)
            return launch

        monkeypatch.setattr(kernels, name, watched)

    watch("_attending", ["out"])
    watch("_going_back", ["grad_locations", "grad_weights"])
    return found


def random_inputs(shapes=SHAPES, *, batch=1, queries=3, heads=2, channels=4, points=2, beyond=0.3):
    pixels, levels = sum(height * width for height, width in shapes), len(shapes)
    locations = torch.rand(batch, queries, heads, levels, points, 2) * (1 + 2 * beyond) - beyond
    return torch.randn(batch, pixels, heads, channels), locations, torch.randn(batch, queries, heads, levels, points)


def forms(shapes, softmax):
    """The kernel and the definition."""

    def call(backend):
        return lambda value, locations, weights: deformable_attention(
            value, shapes, locations, weights, softmax=softmax, backend=backend
        )

    return call("triton"), call("eager")


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (SHAPES, {"batch": 2}),
        ([(1, 1)], {"queries": 1, "heads": 1, "channels": 1, "points": 1}),
        ([(5, 3), (1, 1), (4, 1)], {"queries": 19, "heads": 3, "channels": 7, "points": 3}),  # more than one block
        ([(6, 5)], {"queries": 5, "channels": 33, "points": 5, "beyond": 2.0}),
    ],
    ids=["usual", "one of all", "odd sizes", "mostly outside"],
)
def test_matches_the_definition(shapes, sizes, softmax):
    assert_matches_reference(*forms(shapes, softmax), random_inputs(shapes, **sizes))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, softmax):
    assert_matches_reference(*forms(SHAPES, softmax), random_inputs(), dtype=dtype)


def test_dtypes_may_differ():
    value, locations, weights = random_inputs()
    leaves = [x.requires_grad_() for x in (value.bfloat16(), locations, weights.half())]
    out = deformable_attention(leaves[0], SHAPES, *leaves[1:], backend="triton")
    want = deformable_attention(leaves[0].double(), SHAPES, leaves[1].double(), leaves[2].double(), backend="eager")
    assert out.dtype == torch.bfloat16 and relative_error(out, want) <= TOLERANCES[torch.bfloat16]
    grad = torch.randn_like(out)
    for got, ref in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad.double()), strict=True):
        assert got.dtype == ref.dtype and relative_error(got, ref) <= TOLERANCES[torch.bfloat16]


def test_borders_and_centres():
    """Gradients there are one-sided, and the definition's side is the kernel's."""
    shapes = [(2, 4), (1, 2)]
    levels = []
    for height, width in shapes:
        levels.append(torch.cartesian_prod(*(torch.arange(-2, 2 * side + 3) / 2 / side for side in (width, height))))
    count = max(len(level) for level in levels)
    locations = torch.stack([level.repeat(-(-count // len(level)), 1)[:count] for level in levels], 1)[None, :, None, :, None]
    value, weights = torch.randn(1, 10, 1, 3), torch.randn(locations.shape[:-1])
    assert_matches_reference(*forms(shapes, False), [value, locations, weights])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
def test_far_away_and_no_number():
    value, locations, weights = random_inputs(queries=6)
    clean = deformable_attention(value, SHAPES, locations, weights, backend="triton")
    for query, place in enumerate((1e3, 3e38, math.inf, -math.inf)):
        locations[0, query] = place
    locations[0, 4, 0] = math.nan
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    out = deformable_attention(leaves[0], SHAPES, *leaves[1:], backend="triton")
    assert not out[0, :4].any()
    assert out[0, 4, :4].isnan().all() and out.isnan().sum() == 4
    assert torch.equal(out[0, 5], clean[0, 5])
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert grads[0][:, :, 1].isfinite().all() and grads[1][0, :4].isfinite().all() and grads[1][0, 5].isfinite().all()


def test_any_strides():
    value, locations, weights = random_inputs(batch=2)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (value, locations, weights)]
    kernel, definition = forms(SHAPES, True)
    assert torch.equal(kernel(*turned), kernel(value, locations, weights))
    leaves = [x.requires_grad_() for x in turned]
    grad = torch.randn(2, 8, 3).mT
    got = torch.autograd.grad(kernel(*leaves), leaves, grad)
    want = torch.autograd.grad(definition(*leaves), leaves, grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(kernel(value[:1].expand(2, -1, -1, -1), locations, weights)[0], kernel(value, locations, weights)[0])


def test_only_needed_gradients_are_made(launches):
    inputs = random_inputs()
    grad = torch.randn(1, 3, 8)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(deformable_attention(leaves[0], SHAPES, *leaves[1:], backend="eager"), leaves, grad)
    for index in range(3):
        leaves = [x.detach().clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        deformable_attention(leaves[0], SHAPES, *leaves[1:], backend="triton").backward(grad)
        torch.testing.assert_close(leaves[index].grad, want[index])
        assert launches[-1].arguments["TO_VALUE"] == (index == 0)
        assert launches[-1].arguments["TO_REST"] == (index > 0)


@pytest.mark.parametrize("softmax", [False, True])
def test_with_deterministic_algorithms_nothing_is_added_atomically(launches, softmax):
    leaves = [x.requires_grad_() for x in random_inputs(batch=2, queries=5)]
    kernel, definition = forms(SHAPES, softmax)
    grad = torch.randn(2, 5, 8)
    want = torch.autograd.grad(definition(*leaves), leaves, grad)
    torch.use_deterministic_algorithms(True)
    try:
        got = torch.autograd.grad(kernel(*leaves), leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, want)
    assert [launch.arguments.get("TO_VALUE") for launch in launches] == [None, False]


def test_auto_is_the_kernel(launches):
    value, locations, weights = random_inputs()
    deformable_attention(value, SHAPES, locations, weights)
    assert len(launches) == 1
    double = deformable_attention(value.double(), SHAPES, locations.double(), weights.double())
    assert len(launches) == 1 and double.dtype == torch.float64


def test_what_the_kernel_refuses(monkeypatch):
    value, locations, weights = random_inputs()
    with pytest.raises(RuntimeError, match=r"^deformable_attention: backend='triton' is not possible here: some input is float64"):
        deformable_attention(value.double(), SHAPES, locations, weights, backend="triton")
    with pytest.raises(RuntimeError, match=r"some axis has no element\.$"):
        deformable_attention(value, SHAPES, locations[:, :0], weights[:, :0], backend="triton")
    wide = torch.randn(1, 14, 2, 1025)
    with pytest.raises(RuntimeError, match=r"there are 1025 channels per head and it takes at most 1024\.$"):
        deformable_attention(wide, SHAPES, locations, weights, backend="triton")
    torch.testing.assert_close(
        *(deformable_attention(wide, SHAPES, locations, weights, backend=name) for name in ("auto", "eager"))
    )
    monkeypatch.setattr(deformable, "MOST_CORNERS", 20)
    with pytest.raises(RuntimeError, match=r"the values, locations or outputs of one image are more than 2\^31 numbers\.$"):
        deformable_attention(value, SHAPES, locations, weights, backend="triton")
