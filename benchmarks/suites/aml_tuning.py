"""AML's scale and threshold, tuned on a tenth of the training samples that is held out; no validation sample is looked at."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.suites.aml import LEVEL, masked_training, shares_of
from benchmarks.suites.suite import Budget, Cell, Cells, Suite, Variant, bars, budget_of, save_figure, table, train_model

MODEL = "caris_tiny"
ALIGN_DIM = 2048
GRID = {"scale1": (1, 0.4), "default": (2, 0.4), "scale4": (4, 0.4), "low": (2, 0.3), "high": (2, 0.5)}

VARIANTS = {"plain": Variant("no masking", "plain", options={"way": "plain"})} | {
    name: Variant(
        "" if name == "default" else "scale" if name.startswith("scale") else "threshold",
        f"scale {factor} sqrt(D), threshold {threshold}",
        options={"way": "aml", "scale": factor * ALIGN_DIM**0.5, "threshold": threshold, "align_dim": ALIGN_DIM},
    )
    for name, (factor, threshold) in GRID.items()
}


def split(steps: int, batch: int, samples: int) -> tuple[int, range]:
    """How many of the training samples are trained on, and the indices of those that are held out: the last tenth."""
    trained = steps * batch
    tenth = max(1, trained // 9)
    return trained, range(trained, trained + min(tenth, samples))


def run_cell(variant: Variant, seed: int, budget: Budget) -> Cell:
    """Train with one scale and threshold; score on what was held out."""
    from torch.utils.data import Subset

    from gresbox.data import SyntheticGRES
    from gresbox.models import create_model

    model: Any = create_model(MODEL, **variant.model)
    _, held_out = split(budget.steps, budget.batch, budget.samples)
    options = dict(variant.options)
    val_set = Subset(SyntheticGRES("train", held_out.stop, level=LEVEL), list(held_out))
    aml = masked_training(model, options.pop("way"), **options)
    scores, log = train_model(model, seed, budget, level=LEVEL, val_set=val_set, aml=aml)
    return {"scores": scores, "shares": shares_of(log)}


def page(suite: Suite, found: Cells) -> str:
    """The documentation's page."""
    budget = budget_of(found)
    trained, held_out = split(budget.steps, budget.batch, budget.samples)
    cells = [cell for group in found.values() for cell in group]
    seeds = ", ".join(map(str, suite.seeds))
    return "\n".join(
        [
            "# AML's scale and threshold",
            "",
            f"`{MODEL}`, level {LEVEL}, {budget.steps} steps of {budget.batch} samples: the first {trained} of the training split,",
            f"scored on {len(held_out)} of the tenth that follows; the validation split was not looked at.",
            f"{len(cells)} cells, seeds {seeds}, {budget.threads} CPU thread(s) a cell.",
            "Mean ± standard deviation over seeds in percent; in brackets the difference to the default, or an equals sign where",
            "it is smaller than the larger of the two spreads.",
            "",
            *table(suite, found),
            "",
            *shares_table(found),
            "",
            "![gIoU per scale and threshold](_static/ablation_aml_tuning.png)",
            "",
            "Made by `python -m benchmarks.ablate --suite aml_tuning --table` from the files in",
            "`benchmarks/results/ablate/aml_tuning/`.",
            "",
        ]
    )


def shares_table(found: Cells) -> list[str]:
    """What each scale and threshold selected, over the whole training."""
    names = ("weak", "candidate", "masked", "target_hidden")
    titles = ("weak pixels", "candidate blocks", "hidden pixels", "hidden of the target")
    lines = [f"| variant | {' | '.join(titles)} |", "|---|" + "---|" * len(names)]
    for variant, cells in found.items():
        if cells[0]["shares"]:
            means = [f"{statistics.mean(cell['shares'][name] for cell in cells):.3f}" for name in names]
            lines.append(f"| {VARIANTS[variant].title} | {' | '.join(means)} |")
    return lines


def plot(suite: Suite, found: Cells, path: Path) -> None:
    """Bars of gIoU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bars(axes, suite, found, "gIoU")
    axes.invert_yaxis()
    save_figure(figure, path)


SUITE = Suite(
    name="aml_tuning",
    about="AML's scale and threshold, on a held-out tenth of the training samples",
    variants=VARIANTS,
    metrics=("gIoU", "cIoU", "N_acc", "T_acc"),
    budget=Budget(steps=400, samples=1000, threads=1, batch=16),
    run_cell=run_cell,
    page=page,
    plot=plot,
    page_file="ablation_aml_tuning",
)
