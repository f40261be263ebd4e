"""The one way in which an op is registered, on an op made for this test."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import _backend
from gresbox.ops._register import Forms, define_op

calls: list[object] = []


def _forward(x, weight, power):
    calls.append("plain")
    value = x.pow(power)
    return value if weight is None else value * weight


def _kernel(x, weight, power):
    calls.append("kernel")
    return x.pow(power) if weight is None else x.pow(power) * weight


def _backward(grad, x, weight, power, needs):
    calls.append(list(needs))
    to_x = power * x.pow(power - 1) * (1 if weight is None else weight)
    return grad * to_x if needs[0] else None, (grad * x.pow(power)).contiguous() if needs[1] else None


power_of = define_op(
    "test_power(Tensor x, Tensor? weight, int power) -> Tensor",
    fake=lambda x, weight, power: x.new_empty(x.shape),
    forward=Forms(_forward, _kernel, lambda x, weight, power: "too high" if power > 3 else None),
    backward=Forms(_backward),
    differentiable=("x", "weight"),
)


def leaves():
    return torch.rand(2, 3, dtype=torch.float64).add(1).requires_grad_(), torch.rand(2, 3, dtype=torch.float64).requires_grad_()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself reads one
def test_pytorchs_own_checks_pass():
    x, weight = leaves()
    torch.library.opcheck(power_of, (x, weight, 3))
    torch.library.opcheck(power_of, (x, None, 2))
    torch.library.opcheck(torch.ops.gresbox.test_power_backward.default, (x.detach(), x.detach(), None, 3, [True, False]))
    assert torch.autograd.gradcheck(lambda x, weight: power_of(x, weight, 3), (x, weight))


def test_the_backward_op_computes_what_is_needed():
    x, weight = leaves()
    calls.clear()
    power_of(x, weight.detach(), 2).sum().backward()
    power_of(x, None, 2).sum().backward()
    power_of(x.detach(), weight, 2).sum().backward()
    assert calls == ["plain", [True, False], "plain", [True, False], "plain", [False, True]]
    torch.testing.assert_close(x.grad, 2 * x.detach() * (1 + weight.detach()))


def test_a_second_backward_pass_is_refused():
    x, weight = leaves()
    (first,) = torch.autograd.grad(power_of(x, weight, 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^test_power: the gradient has no gradient of its own here; use backend='eager'"):
        first.sum().backward()


def test_the_form_is_chosen_at_the_call(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("GRESBOX_DISABLE_TRITON", raising=False)
    monkeypatch.setattr(_backend, "_TRITON", (3, 6))
    calls.clear()
    x = torch.rand(2, 3)
    power_of(x, None, 3)
    power_of(x, None, 4)
    power_of(x.double(), None, 3)
    monkeypatch.setenv("GRESBOX_DISABLE_TRITON", "1")
    power_of(x, None, 3)
    assert calls == ["kernel", "plain", "plain", "plain"]


def test_it_compiles_and_exports_as_one_node():
    x, weight = leaves()

    def squared(x, weight):
        return power_of(x, weight, 2) + 1

    torch._dynamo.reset()
    got = torch.compile(squared, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(got, squared(x, weight))
    assert torch.autograd.grad(got.sum(), (x, weight))[0].shape == x.shape

    class Squared(torch.nn.Module):
        def forward(self, x):
            return squared(x, None)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Squared(), (x.detach(),), dynamic_shapes=({0: rows},))
    assert "gresbox.test_power.default" in str(program.graph)
    assert program.module()(torch.ones(5, 3, dtype=torch.float64)).shape == (5, 3)
    assert power_of(x.detach().to("meta"), None, 2).shape == (2, 3)


def test_autocast_is_off_inside():
    seen = []
    define_op(
        "test_autocast(Tensor x) -> Tensor",
        fake=lambda x: x.new_empty(x.shape),
        forward=Forms(lambda x: seen.append((x @ x).dtype) or x.clone()),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.ops.gresbox.test_autocast(torch.eye(2))
    assert seen == [torch.float32]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_an_auxiliary_output_is_saved_for_the_backward_op():
    def forward(x):
        return x.exp(), x > 0

    def backward(grad, x, positive, needs):
        return grad * x.exp() * torch.where(positive, 1.0, 0.5).to(x.dtype)

    clipped = define_op(
        "test_auxiliary(Tensor x) -> (Tensor, Tensor)",
        fake=lambda x: (x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)),
        forward=Forms(forward),
        backward=Forms(backward),
        differentiable=("x",),
        auxiliary=(1,),
    )
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    value, positive = clipped(x)
    assert value.requires_grad and not positive.requires_grad
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], x.detach().exp() * torch.tensor([0.5, 1.0]))
    torch.library.opcheck(clipped, (x,))
    got = torch.compile(lambda x: clipped(x)[0] * 2, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], x.detach().exp() * torch.tensor([1.0, 2.0]))


def test_a_module_that_is_executed_again_gets_its_op_and_no_other_may_take_the_name():
    schema = "test_power(Tensor x, Tensor? weight, int power) -> Tensor"
    assert define_op(schema, fake=None, forward=Forms(_forward)) is power_of
    with pytest.raises(RuntimeError, match="register an operator"):
        define_op(schema, fake=None, forward=Forms(torch.add))
