"""Two processes together give what one gives alone, although their samplers repeat samples and one of them may have none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(Path(__file__).parent / "two_processes.py")


def flat(value):
    return value if isinstance(value, list) else [value]


def test_two_processes_are_one(tmp_path, processes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    meeting = str(tmp_path / "meeting")
    running = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), "2", meeting], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    try:
        wanted = processes.run(0, 1)
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0], outputs[0][1].decode()[-2000:] + outputs[1][1].decode()[-2000:]
    for out, _ in outputs:
        got = json.loads(out)
        assert got.keys() == wanted.keys()
        for name, result in wanted.items():
            assert got[name].keys() == result.keys(), name
            for key, value in result.items():
                if isinstance(value, list) and name in processes.SUBJECTS:
                    assert sorted(got[name][key]) == pytest.approx(sorted(value), abs=1e-10), (name, key)
                else:
                    assert flat(got[name][key]) == pytest.approx(flat(value), abs=1e-10, nan_ok=True), (name, key)


def test_the_samples_hold_every_kind(processes):
    samples = processes.make_samples(23)
    assert set(samples["kind"]) == set(processes.KINDS)
    assert any(not mask.any() for mask in samples["pred"])
    assert len({tuple(mask.shape) for mask in samples["pred"]}) > 5
    assert any(len(boxes) > 1 for boxes in samples["boxes"])
