"""The choice of backend."""

from __future__ import annotations

import pytest
import torch

from gresbox.ops import _backend, align_phrases


def test_every_reason_against_triton(monkeypatch):
    on_cpu = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GRESBOX_DISABLE_TRITON", raising=False)
    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    assert _backend.why_not_triton(on_cpu) == "Triton is not installed"
    monkeypatch.setattr(_backend, "has_triton", lambda: True)
    assert _backend.why_not_triton(on_cpu) == "inputs are on cpu, not on one CUDA device"
    assert _backend.why_not_triton(on_cpu, on_cpu.to("meta")) == "inputs are on cpu and meta, not on one CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.why_not_triton(on_cpu) is None
    assert _backend.use_triton("f", "auto", on_cpu, kernel=True)
    assert not _backend.use_triton("f", "eager", on_cpu, kernel=True)
    assert not _backend.use_triton("f", "auto", on_cpu)
    monkeypatch.setenv("GRESBOX_DISABLE_TRITON", "1")
    assert _backend.why_not_triton(on_cpu) == "GRESBOX_DISABLE_TRITON is set"
    with pytest.raises(RuntimeError, match=r"^f: backend='triton' is not possible here: GRESBOX_DISABLE_TRITON is set\.$"):
        _backend.use_triton("f", "triton", on_cpu, kernel=True)


def test_has_triton_is_whether_it_can_be_imported():
    try:
        import triton  # noqa: F401
    except ImportError:
        assert not _backend.has_triton()
    else:
        assert _backend.has_triton()


def test_an_op_without_a_kernel_says_so():
    queries, tokens = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    with pytest.raises(
        RuntimeError, match=r"^align_phrases: backend='triton' is not possible here: this op has no Triton kernel\.$"
    ):
        align_phrases(queries, tokens, backend="triton")
    with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', 'eager', 'triton', got 'cuda'\.$"):
        align_phrases(queries, tokens, backend="cuda")
