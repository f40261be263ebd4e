"""How kernels are tested without a GPU: interpreted in a process of their own, and again with a deliberate mistake in them.

``tests/kernels/interpreted_NAME.py`` holds the interpreted checks; pytest does not collect it. ``tests/kernels/test_NAME.py`` runs
it once by ``run_interpreted("NAME")`` and, per mistake, by ``is_caught("NAME", "old text", "new text", "a -k expression")``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent


def interpret(name: str, options: Sequence[str], package: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """Run the interpreted checks of one kernel on the gresbox of a folder."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(package)}
    for inherited in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "GRESBOX_DISABLE_TRITON"):
        environment.pop(inherited, None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
        "-W",
        "ignore:Conversion of an array with ndim:DeprecationWarning",  # by the interpreter of Triton 3.6
    ]
    command += [*options, str(ROOT / "tests" / "kernels" / f"interpreted_{name}.py")]
    return subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=limit, check=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For the interpreted checks: the names of the kernels that ran; what a kernel leaves unwritten is NaN, or -1 in integers."""
    import torch

    from gresbox.kernels import _launch

    names: list[str] = []
    run, empty = _launch.Launch.run, torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made = empty(self, *args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(_launch.Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self)))
    torch.manual_seed(0)
    return names


def need_interpreter() -> None:
    """Skip where Triton's interpreter cannot count."""
    triton = pytest.importorskip("triton", minversion="3.6")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("Triton 3.6 cannot interpret kernels with NumPy 2.4 or newer")


@pytest.fixture
def float16_error() -> Callable[..., float]:
    """Error of the gradients of ``matched_mask_losses`` in float16, of embeddings or pixels, for losses of some weight."""
    import torch

    from gresbox.ops import matched_mask_losses
    from gresbox.testing import relative_error

    def error(queries, pixels, targets, matches, weight):
        leaves = [leaf.half().requires_grad_() for leaf in (queries, pixels)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

        def gradients(inputs):
            losses = torch.stack(matched_mask_losses(*inputs, targets, matches, dtype=torch.float32)).float()
            return torch.autograd.grad(losses.sum() * weight, inputs)

        return max(relative_error(got, want.half()) for got, want in zip(gradients(leaves), gradients(exact), strict=True))

    return error


@pytest.fixture
def run_interpreted() -> Callable[..., None]:
    """Run ``interpreted_NAME.py`` and show what failed."""
    need_interpreter()

    def run(name: str, limit: float = 300) -> None:
        done = interpret(name, ["--durations=5"], ROOT, limit)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"

    return run


@pytest.fixture
def is_caught(tmp_path: Path) -> Callable[..., bool]:
    """Whether the interpreted checks fail on a copy of the package with a mistake in the kernel file."""
    need_interpreter()

    def run(name: str, old: str, new: str, select: str = "", limit: float = 120) -> bool:
        shutil.copytree(ROOT / "gresbox", tmp_path / "gresbox", ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "gresbox" / "kernels" / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        done = interpret(name, ["-k", select] if select else [], tmp_path, limit)
        assert done.returncode in (0, 1), f"no test ran: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        shutil.rmtree(tmp_path / "gresbox")
        return done.returncode == 1 and ("AssertionError" in done.stdout or "InterpreterError" in done.stdout)

    return run
