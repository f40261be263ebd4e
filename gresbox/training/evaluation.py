"""Evaluation with the benchmark's metrics, alone or over several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gresbox._checks import check_range
from gresbox.metrics import GRESMetric
from gresbox.training.batches import EvaluationBatch, EvaluationCollate, make_loader
from gresbox.training.processes import process_rank, world_size
from gresbox.training.records import progress_bar

__all__ = ["COUNTS", "EvaluationOptions", "evaluate"]

COUNTS = ("samples", "no_target_share")
"""Entries of a result that describe the data, not the model."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is scored.

    Args:
        batch: Samples per forward pass and process.
        workers: Processes that load data; 0: this one does.
        resized: Score on the model's input square, as ReLA does, instead of at the pictures' own sizes; cIoU differs.
        no_target_threshold: The answer is "nothing" above this probability; in [0, 1].
        limit: Score the first samples only; None: all.
        progress: Show a progress bar.

    Raises:
        ValueError: If a number is out of range.
    """

    batch: int = 16
    workers: int = 0
    resized: bool = False
    no_target_threshold: float = 0.5
    limit: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_range("EvaluationOptions", "batch", self.batch, 1)
        check_range("EvaluationOptions", "workers", self.workers, 0)
        check_range("EvaluationOptions", "no_target_threshold", self.no_target_threshold, 0, 1)
        if self.limit is not None:
            check_range("EvaluationOptions", "limit", self.limit, 1)


def evaluate(model: nn.Module, dataset: Any, options: EvaluationOptions | None = None, *, metric: Any = None) -> dict[str, float]:
    """Score a model on a data set, through the same post-processing as ``model.predict``.

    In a distributed run each process takes every ``world``-th sample and the sums are added up, so every sample counts once
    whatever the number of processes. All processes must call this; all get the result.

    Args:
        model: Any model of the library; its weights may be anywhere, its mode is put back afterwards.
        dataset: Has a length and gives a :class:`gresbox.structures.GresSample` per index.
        options: How to score.
        metric: A torchmetrics metric with :class:`gresbox.metrics.GRESMetric`'s ``update``; default: that one.

    Returns:
        The metric's numbers, in percent, and ``samples`` and ``no_target_share``, the share of no-target samples in percent.

    Raises:
        ValueError: If the data set is empty.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> from gresbox.models import create_model
        >>> model = create_model("instalign_tiny", image_size=64)
        >>> scores = evaluate(model, SyntheticGRES("val", 4, image_size=64))
        >>> int(scores["samples"]), "gIoU" in scores
        (4, True)
    """
    options = options or EvaluationOptions()
    total = len(dataset) if options.limit is None else min(len(dataset), options.limit)
    if total < 1:
        raise ValueError("evaluate: `dataset` must hold at least one sample, got none.")
    device = next(model.parameters()).device
    metric = (GRESMetric() if metric is None else metric).to(device)
    metric.reset()
    share = list(range(process_rank(), total, world_size()))
    batches = [[(index, index) for index in share[start : start + options.batch]] for start in range(0, len(share), options.batch)]
    loader = make_loader(dataset, batches, EvaluationCollate(model.processor, options.resized), workers=options.workers)
    empty = torch.zeros((), dtype=torch.int64, device=device)
    with _evaluating(model):
        for batch in _with_progress(loader, len(batches), options.progress):
            _score(model, batch, metric, device, options.no_target_threshold)
            empty += batch.no_target.sum().to(device)
    if world_size() > 1:
        torch.distributed.all_reduce(empty)
    scores = {name: float(value) for name, value in metric.compute().items()}
    return {**scores, "samples": float(total), "no_target_share": 100.0 * int(empty) / total}


def _score(model: nn.Module, batch: EvaluationBatch, metric: Any, device: torch.device, threshold: float) -> None:
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
    answers = model.postprocess(model(**inputs), batch.sizes, no_target_threshold=threshold, instances=False)  # type: ignore[operator]
    probabilities = [answer.no_target_prob for answer in answers]
    flags = None  # without a no-target output the metric's own rule decides from the mask
    if None not in probabilities:
        flags = torch.tensor([probability > threshold for probability in probabilities], device=device)
    metric.update(
        [answer.mask for answer in answers], [truth.to(device) for truth in batch.truths], flags, batch.no_target.to(device)
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a model caches here, training must be able to use
            yield
    finally:
        model.train(training)


def _with_progress(loader: Any, length: int, show: bool) -> Any:
    if not show or process_rank() != 0:
        return loader
    return progress_bar(iterable=loader, total=length, desc="evaluate", unit="batch", leave=False)
