"""Checkpoints that are either whole or absent.

Each is a directory ``step-00000100`` that is written under another name, flushed to the disk and then renamed: a process that is
killed at any moment leaves the previous checkpoint or the new one. Weights are safetensors; the rest is read with
``weights_only=True``, so opening a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gresbox._files import remove, write_atomically

__all__ = ["Checkpoints", "TrainState"]


@dataclass(frozen=True)
class TrainState:
    """Everything beside the weights that a training needs to go on as if nothing had happened.

    Args:
        step: Optimiser steps done; with the run's seed it is also the position in the data order.
        seconds: Training time so far.
        optimizer: The optimiser's ``state_dict``.
        random: One :func:`gresbox.training.randomness.get_random_state` per process.
        run: What must not change on the way (seed, batch, samples), to be compared on resuming.
        scaler: The gradient scaler's ``state_dict`` of fp16 training.
    """

    step: int
    seconds: float
    optimizer: dict[str, Any]
    random: list[dict[str, Any]]
    run: dict[str, Any]
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are; made when the first is written.
        keep: How many of the newest stay.
    """

    folder: Path
    keep: int = 2

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, oldest first."""
        names = [item.name for item in self.folder.glob("step-*") if (item / "state.pt").is_file()] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(self, model: nn.Module, state: TrainState) -> Path:
        """Write one checkpoint, then drop all but the newest ``keep``; each is also a model that ``load_model`` opens."""

        def write(temporary: Path) -> None:
            model.save_pretrained(str(temporary))  # type: ignore[operator]
            torch.save(vars(state), temporary / "state.pt")
            described = {"step": state.step, "seconds": state.seconds, **state.run}
            (temporary / "run.json").write_text(json.dumps(described, indent=2) + "\n")

        path = self._path(state.step)
        write_atomically(path, write)
        for step in self.steps()[: -self.keep]:
            remove(self._path(step))
        return path

    def load(self, model: nn.Module, step: int) -> TrainState:
        """Put the weights of a step into ``model`` and return the rest.

        Raises:
            ValueError: If the checkpoint cannot be read or belongs to another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        path = self._path(step)
        try:
            load_model(model, str(path / "model.safetensors"))
            return TrainState(**torch.load(path / "state.pt", map_location="cpu", weights_only=True))
        except (SafetensorError, RuntimeError, OSError, EOFError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
            raise ValueError(f"train: the checkpoint `{path}` cannot be read or belongs to another model ({reason}).") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
