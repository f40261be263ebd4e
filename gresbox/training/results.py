"""What a run's folder holds: checked before the first step, filled after the last."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from gresbox.training.checkpoint import Checkpoints, write_atomically

__all__ = ["check_folder", "save_results", "write_json"]


def check_folder(out: Path, checkpoints: Checkpoints, *, resume: bool) -> None:
    """Make the folder, or say why it cannot be used.

    Raises:
        ValueError: If it holds a run that would be overwritten, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: `out` must be a folder, got the file {out}.")
    steps = checkpoints.steps()
    finished = (out / "metrics.json").is_file()
    if not resume and (steps or finished):
        state = "a finished run" if finished else f"a run at step {steps[-1]}"
        raise ValueError(f"train: `out` must be a new folder, got {out} with {state}; continue it with --resume or choose another.")
    out.mkdir(parents=True, exist_ok=True)


def save_results(model: nn.Module, out: Path, scores: dict[str, float], run: dict[str, Any]) -> None:
    """Save the model and its scores; ``metrics.json`` comes last, so where it is, the run is finished.

    Args:
        model: Saved with ``save_pretrained``.
        out: The run's folder.
        scores: The numbers for ``metrics.json``.
        run: What else it should say, for example the seed.
    """
    final = out / ".final"
    shutil.rmtree(final, ignore_errors=True)
    model.save_pretrained(str(final))  # type: ignore[operator]
    for item in sorted(final.iterdir()):
        os.replace(item, out / item.name)
    final.rmdir()
    write_json(out / "metrics.json", {**scores, **run})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; NaN becomes null, which JSON has a word for."""
    plain = {name: None if isinstance(value, float) and value != value else value for name, value in content.items()}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8"))
