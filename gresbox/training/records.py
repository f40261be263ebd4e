"""What a run writes down while it runs: a line of JSON per entry, a progress bar, TensorBoard scalars."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gresbox._files import write_atomically

__all__ = ["RunLog", "progress_bar", "read_log"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that was cut off by a crash is left out.

    Args:
        path: The ``log.jsonl`` of a run; without a file there are no entries.
    """
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class RunLog:
    """The log of one run. Only the first process writes; the others' are silent.

    Args:
        folder: The run's folder; gets ``log.jsonl`` and, with TensorBoard, ``tensorboard/``.
        start: Optimiser steps done already; later entries of an earlier attempt are dropped.
        total: Optimiser steps of the whole training.
        active: Whether this process writes.
        progress: Show a progress bar.
        tensorboard: Write TensorBoard scalars.

    Raises:
        ImportError: If TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, *, start: int, total: int, active: bool = True, progress: bool = True, tensorboard: bool = False
    ) -> None:
        self.path = folder / "log.jsonl"
        self.active = active
        self._bar: Any = None
        self._board: Any = None
        if not active:
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= start]
        write_atomically(self.path, lambda temporary: temporary.write_text("".join(map(_line, kept)), encoding="utf-8"))
        if progress:
            self._bar = progress_bar(total=total, initial=start, desc="train", unit="step", dynamic_ncols=True, smoothing=0.1)
        if tensorboard:
            self._board = _tensorboard(folder / "tensorboard")

    def advance(self) -> None:
        """One optimiser step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, numbers: dict[str, float], *, kind: str = "train") -> None:
        """Add an entry: numbers after ``step`` optimiser steps; ``kind`` is ``"train"`` or ``"evaluation"``."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, "kind": kind, **numbers}))
        if self._bar is not None:
            if kind == "train":
                self._bar.set_postfix(
                    {name.removeprefix("loss/"): f"{value:.3g}" for name, value in numbers.items() if "loss" in name}, refresh=False
                )
            else:
                self._bar.write(f"step {step}: " + "  ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """End the progress bar and the TensorBoard file."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


def progress_bar(**options: Any) -> Any:
    """A tqdm bar.

    Args:
        **options: Those of ``tqdm.tqdm``.

    Raises:
        ImportError: If tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "train: `progress` needs tqdm; install it with pip install 'gresbox[train]', or go without a bar."
        ) from error
    return tqdm(**options)


def _line(entry: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite becomes null, which JSON has a word for."""
    plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()}
    return json.dumps(plain) + "\n"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("train: `tensorboard` needs TensorBoard; install it with pip install 'gresbox[train]'.") from error
    return SummaryWriter(str(folder))
