"""Every example runs as a user would run it, and prints what its text promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = {
    "01_compose_blocks.py": "no-target probability: [",
    "02_train_synthetic.py": "grid: True",
    "03_swap_a_block.py": "saved with parts of its own, give them: aggregation=",
    "04_train_with_aml.py": "pictures: True",
    "06_mix_papers.py": "without a gradient: []",
}


def test_every_example_has_a_promise():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_example(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert PROMISES[name] in done.stdout
