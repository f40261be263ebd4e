"""The kernel of ``assign``: interpreted, with mistakes in it, on a GPU where there is one, and its late errors."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from gresbox.ops import _late_errors, assign
from gresbox.ops._late_errors import LateError
from gresbox.ops.assignment import _report_flags

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_interpreted(run_interpreted):
    run_interpreted("assignment")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("long_dual - (distance - shortest)", "long_dual + (distance - shortest)"),  # duals move the wrong way
        ("- dual - long_dual", "- long_dual"),  # the price of the element is forgotten
        ("finite = tl.abs(value) < float", "finite = tl.abs(value) <= float"),  # infinite costs count as finite
    ],
)
def test_mistakes_are_caught(is_caught, old, new):
    assert is_caught("assignment", old, new, "scipy_at_odd_sizes or sets_of_infinite")


class _Arrived:
    done = False

    def query(self):
        return self.done


def test_late_findings_are_reported_in_order_and_without_waiting(monkeypatch):
    report = functools.partial(_report_flags, late=True)
    events = [_Arrived() for _ in range(3)]
    flags = [torch.tensor(values, dtype=torch.int8) for values in ([0, 0], [0, 1], [1, 1])]
    reports = [functools.partial(report, nan_is_large=large) for large in (False, False, True)]
    waiting = _late_errors.deque(zip(events, flags, reports, strict=True))
    monkeypatch.setattr(_late_errors, "_waiting", waiting)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _late_errors.raise_finished()
    assert len(waiting) == 3
    events[0].done = events[1].done = True
    message = r"^assign: `cost` must be free of NaN and -inf .*, got some in problem 1 of the batch of an earlier call\.$"
    with pytest.raises(LateError, match=message):
        _late_errors.raise_finished()
    assert len(waiting) == 1
    events[2].done = True
    with pytest.warns(RuntimeWarning, match="in 2 of the batch's problems of an earlier call, first 0; they count as"):
        _late_errors.raise_finished()
    assert not waiting


def test_no_event_is_asked_while_a_graph_is_captured(monkeypatch):
    """CUDA breaks the capture off, whatever the event."""
    waiting = _late_errors.deque([(None, torch.zeros(1, dtype=torch.int8), None)])
    monkeypatch.setattr(_late_errors, "_waiting", waiting)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _late_errors.raise_finished()
    assert len(waiting) == 1


@on_a_gpu
@pytest.mark.parametrize(("rows", "columns"), [(100, 10), (10, 100), (900, 20), (300, 100), (1024, 128), (37, 37)])
def test_on_a_gpu(rows, columns):
    cost = torch.rand(32, rows, columns)
    counts = torch.randint(0, columns + 1, (32,))
    on_device, on_host = cost.cuda(), counts.tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        matched, partly = assign(on_device, backend="triton"), assign(on_device, counts, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(matched.cpu(), assign(cost))
    assert torch.equal(partly.cpu(), assign(cost, torch.tensor(on_host)))


@on_a_gpu
def test_nan_on_a_gpu_is_reported_by_a_later_call():
    cost = torch.rand(2, 9, 3, device="cuda")
    spoiled = cost.clone()
    spoiled[1, 0, 0] = torch.nan
    matched = assign(spoiled)
    torch.cuda.synchronize()
    with pytest.raises(LateError, match="problem 1 of the batch of an earlier call"):
        assign(cost)
    assert sorted(matched[1].tolist()) == sorted(set(matched[1].tolist()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign(cost)


@on_a_gpu
def test_it_is_captured_in_a_graph():
    cost, counts = torch.rand(4, 50, 6, device="cuda"), torch.tensor([6, 0, 3, 1], device="cuda")
    assign(cost, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matched = assign(cost, counts)
    cost.copy_(torch.rand_like(cost))
    graph.replay()
    assert torch.equal(matched.cpu(), assign(cost.cpu(), counts.cpu()))
