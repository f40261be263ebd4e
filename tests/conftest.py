"""What every test gets: fixed seeds, one thread, no network, golden arrays and, where they are, the real pictures."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # child processes too: the tests run side by side
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REALDATA = ROOT.parent / "shared" / "realdata"
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "gresbox",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("gresbox")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that draw from numpy's global state


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails instead of passing on some machines only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""  # a string is a Unix socket's path
        if host and not str(host).startswith(LOOPBACK):
            raise RuntimeError(f"tests: a connection to {host!r} was attempted; tests run without network.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("m2f_msda")``: the arrays of ``tests/golden/m2f_msda.npz`` by name."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real pictures beside the checkout; tests that need it are skipped where it is absent."""
    if not REALDATA.is_dir():
        pytest.skip("real pictures are not here: ../shared/realdata does not exist")
    return REALDATA
