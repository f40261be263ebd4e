"""What a suite of ablations is: variants and seeds, a cell for each pair, one JSON file per finished cell, a table over the seeds.

A difference to the variant that a row is compared with is printed as "=" where it is smaller than the larger of the two spreads
over seeds.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gresbox._files import write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "ablate"
DOCS = Path(__file__).parents[2] / "docs"
Cell = dict[str, Any]
Cells = Mapping[str, Sequence[Cell]]


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the default.

    Args:
        group: The part of the paper that it belongs to.
        title: How the table calls it.
        model: Fields of the model's config.
        criterion: Options of the criterion, or weights of it, as the suite says.
        steps: Optimiser steps where they are not the suite's.
        options: What else the suite reads.
        base: The variant that it is compared with.
    """

    group: str
    title: str
    model: dict[str, Any] = field(default_factory=dict)
    criterion: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "default"
    steps: int | None = None


@dataclass(frozen=True)
class Budget:
    """How much a cell may cost; all finished cells of a table have the same.

    Args:
        steps: Optimiser steps.
        samples: Validation samples.
        threads: CPU threads.
        batch: Samples per step.
        start: Folder of a trained model whose encoder a cell starts from, in the suites that want one.
    """

    steps: int
    samples: int
    threads: int = 2
    batch: int = 32
    start: Path | None = None


@dataclass(frozen=True)
class Suite:
    """Variants of one experiment.

    Args:
        name: The folder of its results, and ``--suite``.
        about: What it compares, in a line.
        variants: The rows by name.
        metrics: The table's columns.
        budget: The default one.
        run_cell: Trains and scores one variant with one seed: a dict that holds ``"scores"``.
        page: The documentation's page, from the finished cells.
        plot: Draws the page's picture.
        page_file: Where the page goes.
        seeds: The seeds of every variant.
    """

    name: str
    about: str
    variants: Mapping[str, Variant]
    metrics: tuple[str, ...]
    budget: Budget
    run_cell: Callable[[Variant, int, Budget], Cell]
    page: Callable[[Suite, Cells], str]
    plot: Callable[[Suite, Cells, Path], None]
    page_file: str
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Every variant with the first seed, then with the second: an early stop leaves whole tables."""
        return [(name, seed) for seed in self.seeds for name in self.variants]

    def cell_file(self, folder: Path, name: str, seed: int) -> Path:
        """Where a cell's result is."""
        return folder / self.name / f"{name}--seed{seed}.json"

    def finished(self, folder: Path) -> dict[str, list[Cell]]:
        """The finished cells of each variant; variants without one are left out."""
        found: dict[str, list[Cell]] = {}
        for name, seed in sorted(self.cells, key=lambda cell: list(self.variants).index(cell[0])):
            path = self.cell_file(folder, name, seed)
            if path.is_file():
                found.setdefault(name, []).append(json.loads(path.read_text()))
        return found

    def chosen(self, text: str) -> list[tuple[str, int]]:
        """``"3/24"``, ``"3"``, ``"1-24"`` or ``"1,5-8"`` to cells; counting starts at 1."""
        count = len(self.cells)
        cells, _, total = text.partition("/")
        if total and total != str(count):
            raise SystemExit(f"ablate: there are {count} cells, got {text}.")
        numbers: list[int] = []
        for part in cells.split(","):
            first, dash, last = part.partition("-")
            last = last if dash else first
            if not (first.isdigit() and last.isdigit()) or not 1 <= int(first) <= int(last) <= count:
                raise SystemExit(f"ablate: --cells must be I, I-J, I,J or I/{count} with I and J in 1-{count}, got {text}.")
            numbers += range(int(first), int(last) + 1)
        return [self.cells[number - 1] for number in numbers]


def run(suite: Suite, name: str, seed: int, budget: Budget, folder: Path) -> Cell:
    """Run one cell and write its file."""
    import torch

    torch.set_num_threads(budget.threads)
    torch.manual_seed(seed)
    found = suite.run_cell(suite.variants[name], seed, budget)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "threads": budget.threads, "device": "cpu"}
    about = {"variant": name, "seed": seed, "steps": budget.steps, "batch": budget.batch}
    result = {**about, **found, "environment": environment}
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(suite.cell_file(folder, name, seed), partial(Path.write_text, data=text))
    return result


def train_model(
    model: Any, seed: int, budget: Budget, *, level: str, val_set: Any, criterion: Any = None, aml: Any = None, **options: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train in a folder that is thrown away: the scores at the end, and the log."""
    from gresbox.data import SyntheticGRES
    from gresbox.training import EvaluationOptions, TrainOptions, read_log, train

    quiet = {"progress": False, "checkpoint_seconds": 0, "pictures": 0, "cpu": True, "evaluation": EvaluationOptions(batch=50)}
    chosen = TrainOptions(max_steps=budget.steps, batch=budget.batch, seed=seed, **{"log_every": 50, **quiet, **options})
    train_set = SyntheticGRES("train", budget.steps * budget.batch, level=level)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        scores = train(model, train_set, val_set, out, chosen, criterion=criterion, aml=aml)
        return scores, read_log(out / "log.jsonl")


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def values_of(cells: Sequence[Cell], metric: str) -> list[float]:
    """A metric of each cell."""
    return [cell["scores"][metric] for cell in cells]


def compared(values: Sequence[float], base: Sequence[float] | None) -> str:
    """A table's entry: mean, spread, and the difference to the base or "="."""
    entry = f"{statistics.mean(values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else " (one seed)")
    if base is None or len(values) < 2 or len(base) < 2:
        return entry
    return f"{entry} ({difference(values, base)})"


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    """How much larger the mean is, or "=" where that is less than the larger spread."""
    larger = statistics.mean(values) - statistics.mean(base)
    return "=" if abs(larger) < max(spread(values), spread(base)) else f"{larger:+.1f}"


def table(suite: Suite, found: Cells, metrics: Sequence[str] = ()) -> Iterator[str]:
    """A page's table, line by line."""
    metrics = metrics or suite.metrics
    yield "| part | variant | " + " | ".join(metrics) + " |"
    yield "|---|---|" + "---|" * len(metrics)
    for name, cells in found.items():
        variant = suite.variants[name]
        base = None if variant.base == name else found.get(variant.base)
        entries = [compared(values_of(cells, metric), base and values_of(base, metric)) for metric in metrics]
        yield f"| {variant.group or '**default**'} | {variant.title} | {' | '.join(entries)} |"


def budget_of(found: Cells) -> Budget:
    """The one budget that all finished cells have; without one there is no table."""
    cells = [cell for group in found.values() for cell in group]
    settings = {(cell["steps"], int(cell["scores"]["samples"]), cell["environment"]["threads"], cell["batch"]) for cell in cells}
    if len(settings) != 1:
        raise SystemExit(f"ablate: the finished cells must have one budget for a table, got {sorted(settings) or 'no cell'}.")
    return Budget(*settings.pop())


def bars(axes: Any, suite: Suite, found: Cells, metric: str) -> None:
    """A bar per variant with every seed as a dot; the default, or what others are compared with, is darker."""
    for row, (name, cells) in enumerate(found.items()):
        values = values_of(cells, metric)
        axes.barh(row, statistics.mean(values), color="#4c72b0" if suite.variants[name].base == name else "#a8bfdc")
        axes.plot(values, [row] * len(values), ".", color="black", markersize=4)
    axes.set_xlabel(f"{metric} in percent")
    axes.set_yticks(range(len(found)), [suite.variants[name].title for name in found])


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture of a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
