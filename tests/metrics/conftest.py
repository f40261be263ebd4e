"""The official evaluators' inputs and outputs as tensors, and a program that two processes run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def masks(packed: np.ndarray, shape: np.ndarray) -> torch.Tensor:
    height, width = (int(size) for size in shape)
    bits = np.unpackbits(packed, axis=1)[:, : height * width]
    return torch.from_numpy(bits.reshape(-1, height, width).astype(bool))


@pytest.fixture(scope="session")
def sets(golden) -> SimpleNamespace:
    """Each golden set: tensors by name, masks unpacked as ``pred`` and ``gt``, and ``official``, what the evaluators returned."""
    found = {}
    for name in ("grefcoco", "refzom", "res", "rrefcoco", "grec"):
        arrays = golden(f"metrics_{name}")
        official = json.loads((GOLDEN / f"metrics_{name}.json").read_text())
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind != "U"}
        if "pred" in arrays:
            tensors |= {key: masks(arrays[key], arrays["shape"]) for key in ("pred", "gt")}
        if "kind" in arrays:
            tensors["kind"] = [str(kind) for kind in arrays["kind"]]
        found[name] = SimpleNamespace(**tensors, official=official)
    found["instancevg"] = SimpleNamespace(**{key: torch.from_numpy(value) for key, value in golden("igvg_eval").items()})
    return SimpleNamespace(**found)


@pytest.fixture(scope="session")
def processes() -> ModuleType:
    """The program that two processes run, as a module."""
    spec = importlib.util.spec_from_file_location("two_processes", Path(__file__).parent / "two_processes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["two_processes"] = module
    spec.loader.exec_module(module)
    return module
