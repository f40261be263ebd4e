"""The choice of backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gresbox.ops import _backend, align_phrases


def test_every_reason_against_triton(monkeypatch):
    on_cpu = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GRESBOX_DISABLE_TRITON", raising=False)
    monkeypatch.setattr(_backend, "_TRITON", None)
    assert _backend.why_not_triton(on_cpu) == "Triton is not installed"
    monkeypatch.setattr(_backend, "_TRITON", (3, 5))
    assert _backend.why_not_triton(on_cpu) == "Triton 3.5 is installed and kernels need 3.6 or newer"
    monkeypatch.setattr(_backend, "_TRITON", (3, 6))
    assert _backend.why_not_triton(on_cpu) == "inputs are on cpu, not on one CUDA device"
    assert _backend.why_not_triton(on_cpu, on_cpu.to("meta")) == "inputs are on cpu and meta, not on one CUDA device"
    assert _backend.why_not_triton() == "there is no CUDA device here"
    assert set(_backend.ADAPTER_DEVICES) == set(_backend.ADAPTERS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.why_not_triton(on_cpu) is None
    assert _backend.why_not_triton(on_cpu.double()) == "some input is float64 and kernels compute in float32"
    assert _backend.use_triton("f", "auto", on_cpu, kernel=True)
    assert not _backend.use_triton("f", "auto", on_cpu.double(), kernel=True)
    assert not _backend.use_triton("f", "eager", on_cpu, kernel=True)
    assert not _backend.use_triton("f", "auto", on_cpu)
    assert not _backend.use_triton("f", "auto", on_cpu, kernel="too large")
    with pytest.raises(RuntimeError, match=r"^f: backend='triton' is not possible here: too large\.$"):
        _backend.use_triton("f", "triton", on_cpu, kernel="too large")
    monkeypatch.setenv("GRESBOX_DISABLE_TRITON", "1")
    assert _backend.why_not_triton(on_cpu) == "GRESBOX_DISABLE_TRITON is set"
    with pytest.raises(RuntimeError, match=r"^f: backend='triton' is not possible here: GRESBOX_DISABLE_TRITON is set\.$"):
        _backend.use_triton("f", "triton", on_cpu, kernel=True)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "the device is an sm_75 and kernels need sm_80 or newer"), ((8, 0), None), ((9, 0), None), ((12, 0), None)],
)
def test_kernels_are_for_ampere_and_newer(monkeypatch, capability, reason):
    for name in ("TRITON_INTERPRET", "GRESBOX_DISABLE_TRITON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_backend, "_TRITON", (3, 6))
    with FakeTensorMode():
        on_cuda = torch.empty(1, device="cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _backend._why_not_device.cache_clear()
    try:
        assert _backend.why_not_triton(on_cuda) == reason
    finally:
        _backend._why_not_device.cache_clear()


def test_tritons_version_is_read_without_importing_it():
    try:
        import triton
    except ImportError:
        assert not _backend.has_triton()
        assert _backend._triton_version() is None
    else:
        assert _backend.has_triton()
        assert _backend._triton_version() == tuple(int(part) for part in triton.__version__.split(".")[:2])
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, gresbox.ops; print('triton' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False"


def test_an_adapter_is_asked_for_by_name(monkeypatch):
    on_cpu = torch.zeros(1)
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    message = r"^f: backend='deformops' is not possible here: it needs the package deformops; pip install deformops\.$"
    with pytest.raises(ImportError, match=message):
        _backend.use_triton("f", "deformops", on_cpu, adapter="deformops")
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: "found")
    assert not _backend.use_triton("f", "deformops", on_cpu, adapter="deformops")
    with pytest.raises(ValueError, match=r"^f: `backend` must be one of 'auto', 'eager', 'triton', got 'deformops'\.$"):
        _backend.use_triton("f", "deformops", on_cpu)


def test_an_op_without_a_kernel_says_so():
    on_cpu = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"^f: backend='triton' is not possible here: this op has no Triton kernel\.$"):
        _backend.use_triton("f", "triton", on_cpu)
    with pytest.raises(ValueError, match=r"`backend` must be one of 'auto', 'eager', 'triton', got 'cuda'\.$"):
        align_phrases(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), backend="cuda")
