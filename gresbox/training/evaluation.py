"""Evaluation with the benchmark's metrics, alone or over several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice, check_range
from gresbox.metrics import ThresholdSweep
from gresbox.training.batches import EvaluationBatch, EvaluationCollate, make_loader
from gresbox.training.predictions import Answer, PredictionWriter
from gresbox.training.processes import process_rank, world_size
from gresbox.training.records import progress_bar
from gresbox.training.scoring import METRICS, Scorer

__all__ = ["COUNTS", "EvaluationOptions", "evaluate"]

COUNTS = ("samples", "no_target_share")
"""Entries of a result that describe the data, not the model."""

_LEAST_SCORE = 0.05  # boxes below it are not even written; the benchmarks' metrics keep those of 0.7


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is scored.

    Args:
        batch: Samples per forward pass and process.
        workers: Processes that load data; 0: this one does.
        resized: Score on the model's input square instead of at the pictures' own sizes, masks resized by area; cIoU differs. A
            data set opened with ``size=`` has the benchmark's own truth on a square.
        no_target_threshold: The answer is "nothing" above this probability; in [0, 1]. None: the metric's own rule decides.
        limit: Score the first samples only; None: all.
        progress: Show a progress bar.
        metric: A name in :data:`gresbox.training.scoring.METRICS`; None: the metric of the data set's benchmark.

    Raises:
        ValueError: If a number is out of range or the metric unknown.
    """

    batch: int = 16
    workers: int = 0
    resized: bool = False
    no_target_threshold: float | None = 0.5
    limit: int | None = None
    progress: bool = False
    metric: str | None = None

    def __post_init__(self) -> None:
        check_range("EvaluationOptions", "batch", self.batch, 1)
        check_range("EvaluationOptions", "workers", self.workers, 0)
        if self.no_target_threshold is not None:
            check_range("EvaluationOptions", "no_target_threshold", self.no_target_threshold, 0, 1)
        if self.limit is not None:
            check_range("EvaluationOptions", "limit", self.limit, 1)
        check_choice("EvaluationOptions", "metric", self.metric, (None, *METRICS))


def evaluate(
    model: nn.Module,
    dataset: Any,
    options: EvaluationOptions | None = None,
    *,
    metric: Any = None,
    predictions: str | os.PathLike[str] | None = None,
    sweep: ThresholdSweep | None = None,
) -> dict[str, float]:
    """Score a model on a data set, through the same post-processing as ``model.predict``.

    The metric is that of the data set's benchmark, and is told what the benchmark's own evaluator is told; see
    :class:`gresbox.training.scoring.Scorer`. In a distributed run each process takes every ``world``-th sample and the sums are
    added up, so every sample counts once whatever the number of processes. All processes must call this; all get the result.

    Args:
        model: Any model of the library; its weights may be anywhere, its mode is put back afterwards.
        dataset: Has a length and gives a :class:`gresbox.structures.GresSample` per index.
        options: How to score.
        metric: A torchmetrics metric, one of the library's or any with :class:`gresbox.metrics.GRESMetric`'s ``update``; default:
            what ``options.metric`` names.
        predictions: File to write the answers to, from which :func:`gresbox.training.score_predictions` has the same numbers.
        sweep: Is given the same answers: what the no-target threshold does.

    Returns:
        The metric's numbers, in percent, and ``samples`` and ``no_target_share``, the share of no-target samples in percent.

    Raises:
        ValueError: If the data set is empty, the metric does not fit it, or asks for boxes of a model that has none.

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
    chosen = options.metric if metric is None else metric
    scorer = Scorer(dataset, chosen, no_target_threshold=options.no_target_threshold, sweep=sweep, device=device)
    share = list(range(process_rank(), total, world_size()))
    parts = [share[start : start + options.batch] for start in range(0, len(share), options.batch)]
    batches = [[(index, index) for index in part] for part in parts]
    loader = make_loader(dataset, batches, EvaluationCollate(model.processor, options.resized), workers=options.workers)
    writer = None if predictions is None else PredictionWriter(predictions)
    with _evaluating(model), nullcontext() if writer is None else writer:
        for indices, batch in zip(parts, _with_progress(loader, len(batches), options.progress), strict=True):
            answers = _answers(model, batch, device, boxes=scorer.reads_boxes)
            scorer.add(answers, batch.truths, indices)
            if writer is not None:
                writer.add(answers)
    return scorer.compute()


def _answers(model: nn.Module, batch: EvaluationBatch, device: torch.device, *, boxes: bool) -> list[Answer]:
    """What the model says, before anybody decides whether that is "nothing": no probability is above 1."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
    output, sizes = model(**inputs), batch.sizes
    found = model.postprocess(output, sizes, no_target_threshold=1.0, instances=False)  # type: ignore[operator]
    detected = _detected(model, output, sizes) if boxes else [(None, None)] * len(found)
    return [
        Answer(truth.sent_id, one.mask, one.no_target_prob, *parts, ref_id=truth.ref_id)
        for truth, one, parts in zip(batch.truths, found, detected, strict=True)
    ]


def _detected(model: Any, output: Any, sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Boxes and scores of each picture's instances, many more than will be kept."""
    if output.instances is None:
        raise ValueError(f"evaluate: `metric` must not be 'grec' for {type(model).__name__}, which predicts no boxes.")
    if hasattr(model, "detect"):
        found = model.detect(output, sizes)
    else:
        found = model.postprocess(output, sizes, no_target_threshold=1.0, score_threshold=_LEAST_SCORE)
    kept = [one.scores > _LEAST_SCORE for one in found]
    return [(one.boxes_xyxy[keep].float().cpu(), one.scores[keep].double().cpu()) for one, keep in zip(found, kept, strict=True)]


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
