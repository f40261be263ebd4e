"""Matching and criteria never wait for the device: asked of CUDA tensors without data, and of real ones where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gresbox.losses import IGVGCriterion, InstAlignCriterion
from gresbox.matchers import HungarianInstanceMatcher, PointGuidedMatcher
from gresbox.ops import assign, deformable_attention
from gresbox.ops._deformable_corners import value_gradient
from gresbox.structures import GresOutput, GresTarget, InstancePrediction

COUNTS, QUERIES, SIZE = (3, 0, 2), 7, 32
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.item.default}


class Waits(TorchDispatchMode):
    """Names of the operations that a CUDA device would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_cuda = [value.is_cuda for value in args if isinstance(value, torch.Tensor)]
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if (func in WAITS and any(on_cuda)) or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(str(func))
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source, made = (args[1], args[0]) if func is aten.copy_.default else (args[0], out)
            blocking = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
            if (source.is_cuda and not made.is_cuda) or (made.is_cuda and not source.is_cuda and blocking):
                self.found.append(f"{func} {source.device} -> {made.device}")
        return out


def scene(device: str) -> tuple[GresOutput, list[GresTarget]]:
    """What InstAlign and IGVG predict between them, with gradients, and targets: several, none, more."""
    batch, steps = len(COUNTS), 3
    made = {"device": device, "requires_grad": True}
    pixels = torch.randn(batch, 16, 8, 8, **made)
    tokens = torch.randn(batch, 5, 16, device=device)
    layers = [
        InstancePrediction(
            torch.randn(batch, QUERIES, **made),
            torch.randn(batch, QUERIES, 16, **made),
            pixels,
            torch.randn(batch, QUERIES, 16, **made),
            tokens,
            torch.ones(batch, 5, dtype=torch.bool, device=device),
            boxes=torch.rand(batch, QUERIES, 4, **made),
            points=torch.rand(batch, QUERIES, 2, device=device),
        )
        for _ in range(steps)
    ]
    extras = {"minimap": torch.rand(batch, 4, 4, **made), "existence": torch.randn(batch, 2, **made)}
    merged, no_target = torch.randn(batch, 8, 8, **made), torch.randn(batch, **made)
    output = GresOutput(merged, no_target, instances=layers[-1], aux=tuple(layers[:-1]), extras=extras)
    targets = []
    for count in COUNTS:
        masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool, device=device)
        boxes = torch.full((count, 4), 0.5, device=device)
        targets.append(
            GresTarget(masks, boxes, merged=torch.zeros(SIZE, SIZE, dtype=torch.bool, device=device), no_target=count == 0)
        )
    return output, targets


def criteria() -> dict[str, torch.nn.Module]:
    return {
        "InstAlign": InstAlignCriterion(HungarianInstanceMatcher()),
        "InstAlign, points": InstAlignCriterion(HungarianInstanceMatcher(num_points=20)),
        "IGVG": IGVGCriterion(PointGuidedMatcher()),
        "IGVG, official": IGVGCriterion(PointGuidedMatcher(), aux_layers="official", full_size=False),
    }


@pytest.mark.parametrize("name", criteria())
def test_a_criterion_waits_for_nothing(name):
    with FakeTensorMode():
        output, targets = scene("cuda")
        with Waits() as waits:
            losses = criteria()[name](output, targets)
    assert losses["loss"].is_cuda
    assert not waits.found


@pytest.mark.parametrize("matcher", [HungarianInstanceMatcher(), PointGuidedMatcher()], ids=["Hungarian", "point-guided"])
def test_a_matcher_waits_for_nothing(matcher):
    with FakeTensorMode():
        output, targets = scene("cuda")
        with Waits() as waits:
            rows = matcher.match_steps((*output.aux, output.instances), targets)
    assert rows.shape == (3, len(COUNTS), max(COUNTS))
    assert rows.is_cuda
    assert not waits.found


def test_a_values_gradient_in_a_fixed_order_waits_for_nothing():
    with FakeTensorMode():
        value, locations = torch.randn(2, 14, 3, 4, device="cuda"), torch.rand(2, 5, 3, 2, 2, 2, device="cuda")
        with Waits() as waits:
            found = value_gradient(torch.randn(2, 5, 3, 4, device="cuda"), value, [(3, 4), (1, 2)], locations, locations[..., 0])
    assert found.shape == value.shape
    assert not waits.found


HOST_READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


def read_by_the_host(call: Callable[[], Any]) -> set[str]:
    """Operations of a call for which the host needs a tensor's numbers. Of real tensors: others go ways of their own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    return {event.key for event in profile.key_averages()} & HOST_READS


@pytest.mark.parametrize("name", criteria())
def test_a_criterions_gradient_reads_no_numbers(name):
    output, targets = scene("cpu")
    loss = criteria()[name](output, targets)["loss"]
    assert not read_by_the_host(loss.backward)


def test_reading_numbers_is_seen():
    product = torch.rand(3, 2, requires_grad=True).prod(-1).sum()
    assert read_by_the_host(product.backward)


def test_waiting_is_seen():
    with FakeTensorMode(), Waits() as waits:
        values = torch.empty(3, device="cuda")
        values.cpu()
        torch.empty(3).to("cuda")
        torch.empty(3).to("cuda", non_blocking=True)
        for wait in (lambda: values.sum().item(), lambda: values[values > 0], lambda: values.nonzero()):
            with pytest.raises((RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException)):
                wait()
    assert len(waits.found) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_deformable_attention_on_a_gpu_waits_for_nothing():
    made = {"device": "cuda", "requires_grad": True}
    value, locations = torch.randn(2, 14, 3, 4, **made), torch.rand(2, 5, 3, 2, 2, 2, **made)
    logits = torch.randn(2, 5, 3, 2, 2, **made)

    def step():
        deformable_attention(value, [(3, 4), (1, 2)], locations, logits, softmax=True).sum().backward()

    torch.use_deterministic_algorithms(True)
    try:
        step()
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", criteria())
def test_a_step_on_a_gpu_waits_for_nothing(name):
    output, targets = scene("cuda")
    criterion = criteria()[name]
    criterion(output, targets)["loss"].backward()  # kernels are compiled by the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(output, targets)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert assign(torch.rand(1, 3, 2, device="cuda")).shape == (1, 2)  # a late error would come out here
