"""InstAlign's ablations (arXiv:2411.15087, Table 3a-c) on the synthetic benchmark, level full: same budget, three seeds.

    python -m benchmarks.ablate --list            the cells and which are done
    python -m benchmarks.ablate --cell 3/24       run one cell; a cell that has its file is skipped
    python -m benchmarks.ablate --cells 1-24      run several
    python -m benchmarks.ablate --table           write docs/ablation.md and its plot from the files

A cell is one training and one JSON file in benchmarks/results/ablate/, written when it is finished. A difference to the default
that is smaller than the larger spread over seeds of the two is printed as "=".
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gresbox._files import write_atomically

FOLDER = Path(__file__).parent / "results" / "ablate"
PAGE = Path(__file__).parents[1] / "docs" / "ablation.md"
PLOT = Path(__file__).parents[1] / "docs" / "_static" / "ablation.png"
SEEDS = (0, 1, 2)
METRICS = ("gIoU", "cIoU", "N_acc", "T_acc")
NO_TARGET_WEIGHT = 5.5  # of samples without target in the no-target loss; the preset has more, and places in its early fusion


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the default.

    Args:
        group: The part of Table 3 it belongs to.
        title: How the table calls it.
        model: Fields of the model's config.
        criterion: Options of the criterion.
    """

    group: str
    title: str
    model: dict[str, Any] = field(default_factory=dict)
    criterion: dict[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "default": Variant("", "phrase-aligned, AIA, both inputs"),
    "vanilla": Variant("instance supervision (3a)", "vanilla", {}, {"supervision": "vanilla"}),
    "none": Variant("instance supervision (3a)", "none", {}, {"supervision": "none"}),
    "no_prelu": Variant("aggregation (3b)", "AIA without PReLU", {"aggregation_prelu": False}),
    "select": Variant("aggregation (3b)", "fixed selection", {"aggregation": "select"}),
    "noisy_or": Variant("aggregation (3b)", "noisy-or", {"aggregation": "noisy_or"}),
    "nt_global": Variant("no-target inputs (3c)", "global token only", {"no_target_inputs": "global"}),
    "nt_sentence": Variant("no-target inputs (3c)", "sentence only", {"no_target_inputs": "sentence"}),
}
CELLS = [(name, seed) for seed in SEEDS for name in VARIANTS]


def cell_file(name: str, seed: int) -> Path:
    """Where a cell's result is."""
    return FOLDER / f"{name}--seed{seed}.json"


def run_cell(name: str, seed: int, *, steps: int, samples: int, threads: int) -> dict[str, Any]:
    """Train and score one variant with one seed."""
    import torch

    from gresbox.data import SyntheticGRES
    from gresbox.losses import InstAlignWeights
    from gresbox.models import create_model
    from gresbox.training import EvaluationOptions, TrainOptions, train

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    weights = InstAlignWeights(no_target=2.0, no_target_classes=(1.0, NO_TARGET_WEIGHT))
    model = create_model("instalign_tiny", **{"fusion_position": False, "loss_weights": weights, **variant.model})
    options = TrainOptions(
        max_steps=steps,
        seed=seed,
        progress=False,
        checkpoint_seconds=0,
        log_every=50,
        evaluation=EvaluationOptions(batch=50),
        cpu=True,
    )
    train_set = SyntheticGRES("train", steps * model.recipe.batch, level="full")
    val_set = SyntheticGRES("val", samples, level="full")
    with tempfile.TemporaryDirectory() as folder:
        criterion = model.criterion(**variant.criterion)
        scores = train(model, train_set, val_set, Path(folder) / "run", options, criterion=criterion)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "threads": threads, "device": "cpu"}
    budget = {"steps": steps, "batch": model.recipe.batch}
    return {"variant": name, "seed": seed, **budget, "scores": scores, "environment": environment}


def results(name: str) -> list[dict[str, Any]]:
    """The finished cells of a variant."""
    files = [cell_file(name, seed) for seed in SEEDS]
    return [json.loads(path.read_text()) for path in files if path.is_file()]


def spread(values: list[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def compared(name: str, metric: str) -> str:
    """A table's entry: mean, spread, and the difference to the default or "="."""
    values = [cell["scores"][metric] for cell in results(name)]
    base = [cell["scores"][metric] for cell in results("default")]
    entry = f"{statistics.mean(values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else " (one seed)")
    if name == "default" or len(values) < 2 or len(base) < 2:
        return entry
    difference = statistics.mean(values) - statistics.mean(base)
    same = abs(difference) < max(spread(values), spread(base))
    return f"{entry} ({'=' if same else f'{difference:+.1f}'})"


def table() -> Iterator[str]:
    """The page's table, line by line."""
    yield "| part | variant | " + " | ".join(METRICS) + " |"
    yield "|---|---|" + "---|" * len(METRICS)
    for name, variant in VARIANTS.items():
        if results(name):
            entries = " | ".join(compared(name, metric) for metric in METRICS)
            yield f"| {variant.group or '**default**'} | {variant.title} | {entries} |"


def page() -> str:
    """The documentation's page."""
    cells = [cell for name in VARIANTS for cell in results(name)]
    settings = {(cell["steps"], cell["batch"], int(cell["scores"]["samples"]), cell["environment"]["threads"]) for cell in cells}
    if len(settings) != 1:
        raise SystemExit(f"ablate: the finished cells must have one budget for a table, got {sorted(settings) or 'no cell'}.")
    steps, batch, samples, threads = settings.pop()
    share = statistics.mean(cell["scores"]["no_target_share"] for cell in cells)
    typical = statistics.median(cell["scores"]["seconds"] for cell in cells)
    seeds = ", ".join(map(str, SEEDS))
    return "\n".join(
        [
            "# Ablations on the synthetic benchmark",
            "",
            f"`instalign_tiny`, level full, {steps} steps of {batch} samples, {samples} validation samples,",
            f"{share:.1f} % of them without a target;",
            f"{len(cells)} cells, seeds {seeds}, {threads} CPU thread(s) a cell, {typical:.0f} s of training in the median.",
            "The model is the preset's without `fusion_position` and with a weight of 5.5 on samples without target;",
            "masks are emptied where the answer is 'nothing', which raises cIoU a little.",
            "Mean ± standard deviation over seeds in percent; in brackets the difference to the default, or an equals sign where",
            "it is smaller than the larger of the two spreads. A short training of a small model on drawn scenes says little about",
            "the paper's numbers on photographs; it says which switches work and what they do here.",
            "",
            *table(),
            "",
            "![gIoU and N_acc per variant](_static/ablation.png)",
            "",
            "Made by `python -m benchmarks.ablate --table` from the files in `benchmarks/results/ablate/`.",
            "",
        ]
    )


def plot(path: Path) -> None:
    """Bars of gIoU and N_acc with every seed as a dot."""
    from matplotlib.figure import Figure

    names = [name for name in VARIANTS if results(name)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("gIoU", "N_acc"), strict=True):
        for row, name in enumerate(names):
            values = [cell["scores"][metric] for cell in results(name)]
            axes.barh(row, statistics.mean(values), color="#4c72b0" if name == "default" else "#a8bfdc")
            axes.plot(values, [row] * len(values), ".", color="black", markersize=4)
        axes.set_xlabel(f"{metric} in percent")
        axes.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
    figure.axes[0].invert_yaxis()  # the two share it
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def chosen(text: str) -> list[tuple[str, int]]:
    """``"3/24"``, ``"3"`` or ``"1-24"`` to cells; counting starts at 1."""
    cells, _, total = text.partition("/")
    first, _, last = cells.partition("-")
    numbers = [first, last or first, total or str(len(CELLS))]
    if not all(number.isdigit() for number in numbers) or not 1 <= int(first) <= int(last or first) <= len(CELLS):
        raise SystemExit(f"ablate: --cells must be I, I-J or I/{len(CELLS)} with I and J in 1-{len(CELLS)}, got {text}.")
    if int(numbers[2]) != len(CELLS):
        raise SystemExit(f"ablate: there are {len(CELLS)} cells, got {text}.")
    low, high = int(first), int(last or first)
    return CELLS[low - 1 : high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the cells")
    parser.add_argument("--cell", "--cells", dest="cells", metavar="I/N", help="cell I, or cells I-J")
    parser.add_argument("--table", action="store_true", help="write the documentation's page and plot")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of a cell")
    parser.add_argument("--samples", type=int, default=1000, help="validation samples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    if args.list:
        for number, (name, seed) in enumerate(CELLS, 1):
            print(f"{number:2d}/{len(CELLS)}  {name:12s} seed {seed}  {'done' if cell_file(name, seed).is_file() else '-'}")
    for name, seed in chosen(args.cells) if args.cells else []:
        path = cell_file(name, seed)
        if path.is_file():
            print(f"{path.name}: done before")
            continue
        result = run_cell(name, seed, steps=args.steps, samples=args.samples, threads=args.threads)
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(path, partial(Path.write_text, data=text))
        print(f"{path.name}: " + "  ".join(f"{metric} {result['scores'][metric]:.1f}" for metric in METRICS))
    if args.table:
        write_atomically(PAGE, lambda temporary: temporary.write_text(page()))
        plot(PLOT)
        print("\n".join(table()))


if __name__ == "__main__":
    main()
