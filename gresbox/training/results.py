"""What a run's folder holds: checked before the first step, filled after the last."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from gresbox._files import write_atomically
from gresbox.structures import GresSample
from gresbox.training.checkpoint import Checkpoints
from gresbox.training.options import TrainOptions
from gresbox.training.records import read_log

__all__ = ["check_folder", "save_pictures", "save_results", "write_json"]


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


def save_pictures(model: nn.Module, dataset: Any, out: Path, options: TrainOptions) -> None:
    """Draw the loss curve and some answers into the run's folder; without matplotlib nothing happens.

    Args:
        model: Answers with ``predict``.
        dataset: Where the pictures come from: some with many targets, some with one, some with none.
        out: The run's folder, with its log.
        options: How many, and from which probability on the answer is "nothing".
    """
    if find_spec("matplotlib") is None:
        return
    from gresbox.viz import plot_losses, prediction_grid

    plot_losses(read_log(out / "log.jsonl"), out / "loss_curve.png")
    samples = _mixed(dataset, options.pictures)
    images, texts = [sample.image for sample in samples], [sample.text for sample in samples]
    threshold = options.evaluation.no_target_threshold
    decided = {} if threshold is None else {"no_target_threshold": threshold}
    answers = model.predict(images, texts, **decided)  # type: ignore[operator]
    prediction_grid(samples, answers, out / "pictures.png")


def _mixed(dataset: Any, count: int, look_at: int = 64) -> list[GresSample]:
    """The first samples of each kind in turn, from the beginning of the data set."""
    rows: dict[str, list[GresSample]] = {"many": [], "one": [], "zero": []}
    for index in range(min(len(dataset), max(look_at, count))):
        sample = dataset[index]
        rows.setdefault(sample.kind, []).append(sample)
        if all(len(row) >= count for row in rows.values()):
            break
    chosen: list[GresSample] = []
    for place in range(count):
        chosen += [row[place] for row in rows.values() if place < len(row)]
    return chosen[:count]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; NaN becomes null, which JSON has a word for."""
    plain = {name: None if isinstance(value, float) and value != value else value for name, value in content.items()}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8"))
