"""InstAlign's ablations (arXiv:2411.15087, Table 3a-c) on the synthetic benchmark, level full."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.suites.suite import (
    Budget,
    Cell,
    Cells,
    Suite,
    Variant,
    bars,
    budget_of,
    save_figure,
    table,
    train_model,
)

NO_TARGET_WEIGHT = 5.5  # of samples without target in the no-target loss; the preset has more, and places in its early fusion

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


def run_cell(variant: Variant, seed: int, budget: Budget) -> Cell:
    """Train and score one variant with one seed."""
    from gresbox.data import SyntheticGRES
    from gresbox.losses import InstAlignWeights
    from gresbox.models import create_model

    weights = InstAlignWeights(no_target=2.0, no_target_classes=(1.0, NO_TARGET_WEIGHT))
    model = create_model("instalign_tiny", **{"fusion_position": False, "loss_weights": weights, **variant.model})
    val_set = SyntheticGRES("val", budget.samples, level="full")
    criterion: Any = model.criterion(**variant.criterion)
    return {"scores": train_model(model, seed, budget, level="full", val_set=val_set, criterion=criterion)[0]}


def page(suite: Suite, found: Cells) -> str:
    """The documentation's page."""
    budget = budget_of(found)
    cells = [cell for group in found.values() for cell in group]
    share = statistics.mean(cell["scores"]["no_target_share"] for cell in cells)
    typical = statistics.median(cell["scores"]["seconds"] for cell in cells)
    seeds = ", ".join(map(str, suite.seeds))
    return "\n".join(
        [
            "# Ablations on the synthetic benchmark",
            "",
            f"`instalign_tiny`, level full, {budget.steps} steps of {budget.batch} samples, {budget.samples} validation samples,",
            f"{share:.1f} % of them without a target;",
            f"{len(cells)} cells, seeds {seeds}, {budget.threads} CPU thread(s) a cell, {typical:.0f} s of training in the median.",
            "The model is the preset's without `fusion_position` and with a weight of 5.5 on samples without target;",
            "masks are emptied where the answer is 'nothing', which raises cIoU a little.",
            "Mean ± standard deviation over seeds in percent; in brackets the difference to the default, or an equals sign where",
            "it is smaller than the larger of the two spreads. A short training of a small model on drawn scenes says little about",
            "the paper's numbers on photographs; it says which switches work and what they do here.",
            "",
            *table(suite, found),
            "",
            "![gIoU and N_acc per variant](_static/ablation.png)",
            "",
            "Made by `python -m benchmarks.ablate --table` from the files in `benchmarks/results/ablate/instalign/`.",
            "",
        ]
    )


def plot(suite: Suite, found: Cells, path: Path) -> None:
    """Bars of gIoU and N_acc."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("gIoU", "N_acc"), strict=True):
        bars(axes, suite, found, metric)
    figure.axes[0].invert_yaxis()  # the two share it
    save_figure(figure, path)


SUITE = Suite(
    name="instalign",
    about="instance supervision, aggregation and the no-target head's inputs",
    variants=VARIANTS,
    metrics=("gIoU", "cIoU", "N_acc", "T_acc"),
    budget=Budget(steps=600, samples=1000),
    run_cell=run_cell,
    page=page,
    plot=plot,
    page_file="ablation",
)
