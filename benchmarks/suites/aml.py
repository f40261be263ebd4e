"""AML against the plain training and against random blocks, on clean and on spoilt pictures, for three models.

    python -m benchmarks.ablate --suite aml --start runs/igvg_tiny --cells 1-27

IGVG's cells start from the encoder of a whole training, which learns at a tenth of the rate, as those of the suite ``igvg``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suites import igvg
from benchmarks.suites.suite import (
    Budget,
    Cell,
    Cells,
    Suite,
    Variant,
    bars,
    budget_of,
    difference,
    save_figure,
    table,
    train_model,
    values_of,
)

LEVEL, SEVERITY = "basic", 3
CURVE_POINTS, CURVE_SAMPLES, SPOILT_SAMPLES = 10, 250, 250
SPOILT = "gIoU, spoilt"
MODELS = {"caris_tiny": 800, "instalign_tiny": 700, "igvg_tiny": 250}  # steps that take about as long
WAYS = {"plain": "plain", "random": "random blocks", "aml": "AML"}

VARIANTS = {
    f"{model}-{way}": Variant(model, title, options={"model": model, "way": way}, base=f"{model}-plain", steps=steps)
    for model, steps in MODELS.items()
    for way, title in WAYS.items()
}


class ShuffledMasking(nn.Module):
    """As many hidden blocks in every picture as another masking hides there, in random places.

    Args:
        masking: Of blocks, each of the same side, on pictures that are whole numbers of blocks.
    """

    def __init__(self, masking: Any) -> None:
        super().__init__()
        self.masking = masking
        self.shares: dict[str, Tensor] = {}

    def forward(
        self,
        images: Tensor,
        visual: Tensor,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        targets: Any = None,
        generator: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, removed, similarity = self.masking(images, visual, tokens, valid, targets=targets, generator=generator)
        side = self.masking.block
        blocks = removed[:, ::side, ::side]  # (B, rows, columns)
        order = torch.rand(blocks.flatten(1).shape, generator=generator, device=images.device).argsort(1)
        blocks = blocks.flatten(1).gather(1, order).view_as(blocks)
        removed = blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)
        self.shares = {"masked": removed.float().mean()}
        if targets is not None:
            wanted = torch.stack([target.merged for target in targets])
            self.shares["target_hidden"] = (removed & wanted).sum() / wanted.sum().clamp(min=1)
        return torch.where(removed[:, None], 0.0, images), removed, similarity


def masked_training(model: Any, way: str, **masking: Any) -> Any:
    """The wrapper that a way of training asks for; None for the plain one."""
    from gresbox.blocks import AlignmentAwareMasking
    from gresbox.training import AlignmentMaskedTraining

    if way == "plain":
        return None
    training = AlignmentMaskedTraining(model)
    chosen = AlignmentAwareMasking(*model.encode_dims, **{"block": training.masking.block, **masking})
    return AlignmentMaskedTraining(model, ShuffledMasking(chosen) if way == "random" else chosen)


def run_cell(variant: Variant, seed: int, budget: Budget) -> Cell:
    """Train one model in one way with one seed; score it on clean and on spoilt pictures."""
    from gresbox.data import CORRUPTIONS, Corrupt, SyntheticGRES
    from gresbox.training import EvaluationOptions, evaluate

    model, start = start_model(variant.options["model"], budget.start)
    every = max(1, budget.steps // CURVE_POINTS)
    ended, log = train_model(
        model,
        seed,
        budget,
        level=LEVEL,
        val_set=SyntheticGRES("val", min(CURVE_SAMPLES, budget.samples), level=LEVEL),
        aml=masked_training(model, variant.options["way"]),
        log_every=every,
        evaluate_every=every,
    )
    options = EvaluationOptions(batch=50)
    scores = evaluate(model, SyntheticGRES("val", budget.samples, level=LEVEL), options)
    for name in CORRUPTIONS:
        spoilt = SyntheticGRES("val", min(SPOILT_SAMPLES, budget.samples), level=LEVEL, transform=Corrupt(name, SEVERITY))
        scores[name] = evaluate(model, spoilt, options)["gIoU"]
    scores[SPOILT] = statistics.mean(scores[name] for name in CORRUPTIONS)
    scores |= {name: ended[name] for name in ("steps", "seconds")}
    return {"scores": scores, "curve": curve_of(log), "shares": shares_of(log), "start": start}


def start_model(name: str, start: Path | None) -> tuple[Any, dict[str, Any] | None]:
    """A model to train, and where its encoder comes from; None: from nothing."""
    from gresbox.models import create_model

    if name != "igvg_tiny":
        return create_model(name), None
    model = igvg.create(igvg.VARIANTS["default"])
    weights, about = igvg.pretrained_encoder(start)
    model.encoder.load_state_dict(weights)
    return model, about


def curve_of(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The evaluations of a log with the training seconds at which they were."""
    seconds = {entry["step"]: entry["seconds"] for entry in log if entry["kind"] == "train"}
    scored = [entry for entry in log if entry["kind"] == "evaluation"]
    return [{"step": entry["step"], "seconds": seconds[entry["step"]], "gIoU": entry["gIoU"]} for entry in scored]


def shares_of(log: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over the training of what the masking logged."""
    entries = [entry for entry in log if entry["kind"] == "train"]
    names = sorted(name for name in entries[0] if name.startswith("aml/"))
    return {name.removeprefix("aml/"): statistics.mean(entry[name] for entry in entries) for name in names}


def at_time(curve: list[dict[str, float]], seconds: float) -> float:
    """gIoU at a time, on straight lines between the points of a curve; its first and last value beyond them."""
    before = curve[0]
    for point in curve:
        if point["seconds"] >= seconds:
            width = point["seconds"] - before["seconds"]
            part = (seconds - before["seconds"]) / width if width > 0 else 1.0
            return before["gIoU"] + part * (point["gIoU"] - before["gIoU"]) if part >= 0 else point["gIoU"]
        before = point
    return before["gIoU"]


def equal_time(plain: Cell, other: Cell) -> tuple[float, float, float]:
    """The time at which the first of two runs ended, and gIoU of both then."""
    seconds = min(cell["curve"][-1]["seconds"] for cell in (plain, other))
    return seconds, at_time(plain["curve"], seconds), at_time(other["curve"], seconds)


def pairs(first: list[Cell], second: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Finished cells of two variants with the same seed."""
    by_seed = {cell["seed"]: cell for cell in second}
    return [(cell, by_seed[cell["seed"]]) for cell in first if cell["seed"] in by_seed]


def equal_time_table(found: Cells) -> list[str]:
    """Plain against AML at equal wall time, a row per model."""
    lines = ["| model | seconds | time of a step, AML / plain | plain | AML | AML - plain |", "|---|---|---|---|---|---|"]
    for model in MODELS:
        both = pairs(list(found.get(f"{model}-plain", ())), list(found.get(f"{model}-aml", ())))
        if len(both) < 2:
            continue
        times, plain, aml = zip(*(equal_time(*pair) for pair in both), strict=True)
        cost = statistics.median(second["scores"]["seconds"] / first["scores"]["seconds"] for first, second in both)
        means = f"{statistics.mean(plain):.1f} | {statistics.mean(aml):.1f} | {difference(aml, plain)}"
        lines.append(f"| {model} | {statistics.median(times):.0f} | {cost:.2f} | {means} |")
    return lines


def random_table(found: Cells) -> list[str]:
    """AML against random blocks, and what either hid."""
    lines = ["| model | gIoU | gIoU, spoilt | hidden | of the target, random | of the target, AML |", "|---|---|---|---|---|---|"]
    for model in MODELS:
        aml, random = found.get(f"{model}-aml", ()), found.get(f"{model}-random", ())
        if len(aml) < 2 or len(random) < 2:
            continue
        entries = [difference(values_of(aml, metric), values_of(random, metric)) for metric in ("gIoU", SPOILT)]
        hidden = statistics.mean(cell["shares"]["masked"] for cell in (*aml, *random))
        targets = [statistics.mean(cell["shares"]["target_hidden"] for cell in cells) for cells in (random, aml)]
        lines.append(f"| {model} | {' | '.join(entries)} | {hidden:.3f} | {targets[0]:.3f} | {targets[1]:.3f} |")
    return lines


def setting(suite: Suite, found: Cells) -> list[str]:
    """What the cells have in common."""
    of_model = {model: {name: group for name, group in found.items() if name.startswith(model)} for model in MODELS}
    budgets = {model: budget_of(cells) for model, cells in of_model.items() if cells}
    budget = next(iter(budgets.values()))
    steps = ", ".join(f"{budgets[model].steps} steps for `{model}`" for model in budgets)
    cells = [cell for group in found.values() for cell in group]
    seconds = statistics.median(cell["scores"]["seconds"] for cell in cells)
    seeds = ", ".join(map(str, suite.seeds))
    lines = [
        f"Level {LEVEL}, {budget.batch} samples per step, {steps};",
        f"{budget.samples} clean validation samples, {min(SPOILT_SAMPLES, budget.samples)} for each of the seven corruptions",
        f"at severity {SEVERITY};",
        f"{len(cells)} cells, seeds {seeds}, {budget.threads} CPU thread(s) a cell, {seconds:.0f} s of training in the median.",
        "Mean ± standard deviation over seeds in percent; in brackets the difference to the plain training of the same model,",
        "or an equals sign where it is smaller than the larger of the two spreads. 'Spoilt' is the mean of the corruptions.",
        "All ways of training a model have the same steps, samples and schedule. AML has its defaults, blocks of 8 px.",
    ]
    for start in [cell["start"] for cell in cells if cell["start"]][:1]:
        trained = f"{start['steps']:.0f} steps, gIoU {start['gIoU']:.1f}"
        lines += [
            f"IGVG starts from the encoder of one whole training ({trained}),",
            "which learns at a tenth of the rate; the others start from nothing.",
        ]
    return lines


def page(suite: Suite, found: Cells) -> str:
    """The documentation's page."""
    from gresbox.data import CORRUPTIONS

    return "\n".join(
        [
            "# AML on the synthetic benchmark",
            "",
            *setting(suite, found),
            "",
            *table(suite, found),
            "",
            "gIoU on each corruption:",
            "",
            *table(suite, found, tuple(CORRUPTIONS)),
            "",
            "## AML against random blocks",
            "",
            "'Random blocks' runs AML's own masking, counts the blocks that it hides in each picture, and hides as many blocks of",
            "that picture, drawn evenly among all. Equal are thus, for the same state of the model, the number of hidden blocks of",
            "every picture in every step, the block's size and the fill; different is only which these are. AML minus random:",
            "",
            *random_table(found),
            "",
            "## Equal wall time",
            "",
            "AML's steps take longer. The table reads both curves at the time at which the first of the two runs of a seed ended,",
            f"on straight lines between {CURVE_POINTS} evaluations on the first {CURVE_SAMPLES} validation samples;",
            "evaluations take no part in the time. The run that is still going then has not reached the end of its learning-rate",
            "schedule, which is to its disadvantage.",
            "",
            *equal_time_table(found),
            "",
            "![gIoU per way of training, and curves over seconds](_static/ablation_aml.png)",
            "",
            "Made by `python -m benchmarks.ablate --suite aml --table` from the files in `benchmarks/results/ablate/aml/`.",
            "",
        ]
    )


def plot(suite: Suite, found: Cells, path: Path) -> None:
    """Bars of clean and spoilt gIoU; validation curves over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axes, metric in zip(above.subplots(1, 2, sharey=True), ("gIoU", SPOILT), strict=True):
        bars(axes, suite, found, metric)
        names = [f"{suite.variants[name].group}, {suite.variants[name].title}" for name in found]
        axes.set_yticks(range(len(found)), names)
    above.axes[0].invert_yaxis()  # the two share it
    colours = {"plain": "#4c72b0", "random": "#8c8c8c", "aml": "#c44e52"}
    for axes, model in zip(below.subplots(1, len(MODELS), sharey=True), MODELS, strict=True):
        for way, title in WAYS.items():
            for index, cell in enumerate(found.get(f"{model}-{way}", ())):
                times = [point["seconds"] for point in cell["curve"]]
                values = [point["gIoU"] for point in cell["curve"]]
                axes.plot(times, values, color=colours[way], alpha=0.7, label=None if index else title)
        axes.set_title(model)
        axes.set_xlabel("seconds of training")
    below.axes[0].set_ylabel("gIoU in percent")
    if below.axes[0].lines:
        below.axes[0].legend(fontsize=8)
    save_figure(figure, path)


SUITE = Suite(
    name="aml",
    about="plain training, random blocks and AML for three models",
    variants=VARIANTS,
    metrics=("gIoU", "cIoU", "N_acc", "T_acc", SPOILT),
    budget=Budget(steps=800, samples=1000, threads=1, batch=16),
    run_cell=run_cell,
    page=page,
    plot=plot,
    page_file="ablation_aml",
)
