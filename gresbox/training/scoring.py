"""Answers against the truth by the rules of each benchmark: which metric follows the data, and what it is told of "nothing"."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gresbox._checks import check_choice, check_range
from gresbox.data import SyntheticGRES
from gresbox.metrics import GRECMetric, GRESMetric, RefZOMMetric, RESMetric, RRefCOCOMetric, ThresholdSweep
from gresbox.training.annotated_boxes import read_annotated_boxes
from gresbox.training.batches import Truth, truth_of
from gresbox.training.predictions import Answer, PredictionFile
from gresbox.training.processes import gather_objects
from gresbox.training.records import progress_bar

__all__ = ["METRICS", "Scorer", "check_metric", "default_metric", "make_metric", "score_predictions"]

METRICS: dict[str, type[Any]] = {
    "gres": GRESMetric,
    "res": RESMetric,
    "refzom": RefZOMMetric,
    "rrefcoco": RRefCOCOMetric,
    "grec": GRECMetric,
}
"""The benchmarks' metrics by the name that commands take."""

_CHUNK = 16


def default_metric(dataset: Any) -> str:
    """The metric of a data set's benchmark; of data that belongs to none, gRefCOCO's.

    Args:
        dataset: A data set of :mod:`gresbox.data` or any other; a subset is asked for what it is a subset of.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> default_metric(SyntheticGRES("val", 1))
        'gres'
    """
    return _metrics_of(dataset)[1][0]


def check_metric(who: str, name: str, dataset: Any) -> None:
    """Check that a metric's questions have answers in a data set.

    Args:
        who: The caller's public name; it opens the message.
        name: One of :data:`METRICS`.
        dataset: As for :func:`default_metric`.

    Raises:
        ValueError: If there is no such metric, or it asks for what the benchmark does not have.
    """
    check_choice(who, "metric", name, tuple(METRICS))
    title, fitting = _metrics_of(dataset)
    if name not in fitting:
        raise ValueError(f"{who}: `metric` must be one of {', '.join(map(repr, fitting))} on {title}, got {name!r}.")


def make_metric(name: str, **options: Any) -> Any:
    """Build a metric by its name.

    Args:
        name: One of :data:`METRICS`.
        **options: Of its class, for example ``no_target_rule="pixels"``.

    Raises:
        ValueError: If there is no such metric, or it has no such option; the message lists those that there are.

    Example:
        >>> make_metric("grec", iou_type="iou").iou_type
        'iou'
    """
    check_choice("make_metric", "name", name, tuple(METRICS))
    known = [option for option in inspect.signature(METRICS[name]).parameters if option not in ("kwargs", "per_sample")]
    for option in options:
        if option not in known:
            raise ValueError(f"make_metric: {name!r} has no option {option!r}. Options: {', '.join(known) or 'none'}.")
    try:
        return METRICS[name](**options)
    except TypeError as error:
        raise ValueError(f"make_metric: an option of {name!r} must be of its own type, got another ({error}).") from None


class Scorer:
    r"""Gives a benchmark's metric what its own rules want to know.

    Where an answer has a probability of "nothing", that is the answer above the threshold. Then gRefCOCO's metric gets the flag and
    the mask as predicted, which is what its evaluator adds to the union; R-RefCOCO's gets the flag and empties the mask itself; for
    the others the mask is empty and no box is left. Without a probability, or without a threshold, the metric decides by its own
    rule, from the mask or the boxes.

    Boxes are compared with those that the benchmark's files give (``bbox``) or, where there are none, with the tight boxes of the
    true masks.

    Without a metric the data's own is taken. Where that is gRefCOCO's and the answers have no probability, as those of models for
    referring segmentation with one target, the numbers of :class:`gresbox.metrics.RESMetric` over the expressions with a target
    stand beside it; ``Pr@0.7`` to ``Pr@0.9`` are the same in both.

    Args:
        dataset: What is scored on; it chooses the metric.
        metric: A name in :data:`METRICS`, or a metric: one of those classes, or any with the ``update`` of
            :class:`gresbox.metrics.GRESMetric`.
        no_target_threshold: In [0, 1]; None: probabilities are not looked at.
        sweep: Is given the same answers; its ``compute``, ``summary`` and ``plot`` are the caller's.
        device: Where the metric lives.

    Raises:
        ValueError: If the metric is unknown or does not fit the data.
    """

    def __init__(
        self,
        dataset: Any,
        metric: Any = None,
        *,
        no_target_threshold: float | None = 0.5,
        sweep: ThresholdSweep | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if no_target_threshold is not None:
            check_range("Scorer", "no_target_threshold", no_target_threshold, 0, 1)
        self.threshold, self.device = no_target_threshold, torch.device(device)
        name = default_metric(dataset) if metric is None else metric
        if isinstance(name, str):
            check_metric("Scorer", name, dataset)
        self.metric = (make_metric(name) if isinstance(name, str) else name).to(self.device)
        # answers without a probability get RESMetric's numbers too
        self.beside = RESMetric().to(self.device) if metric is None and name == "gres" else None
        self.sweep = None if sweep is None else sweep.to(self.device)
        for part in (self.metric, self.sweep):
            if part is not None:
                part.reset()
        self.boxes = read_annotated_boxes(_whole(dataset)) if self.reads_boxes else {}
        self.samples, self.empty, self.one_target = 0, 0, False

    @property
    def reads_boxes(self) -> bool:
        """Whether the metric asks for boxes instead of masks."""
        return isinstance(self.metric, GRECMetric)

    def add(self, answers: Sequence[Answer], truths: Sequence[Truth], places: Sequence[int]) -> None:
        """Score some answers.

        Args:
            answers: Their masks are on any one device.
            truths: One per answer.
            places: Each expression's index in the data set; one that comes again does not count again.
        """
        truths = [_annotated(truth, self.boxes.get(truth.ref_id)) for truth in truths]
        batch = _Batch(answers, truths, places, _nothing(answers, self.threshold), self.device)
        _feed(self.metric, batch)
        if self.beside is not None and batch.nothing is None:
            self.one_target = True
            _feed_res(self.beside, batch.chosen([not truth.no_target for truth in truths]))
        if self.sweep is not None:
            _feed_sweep(self.sweep, batch)
        self.samples += len(answers)
        self.empty += sum(truth.no_target for truth in truths)

    def compute(self) -> dict[str, float]:
        """The metric's scalars, and ``samples`` and ``no_target_share``, the share of no-target expressions in percent.

        All processes must call it; all get the result.
        """
        counts = gather_objects((self.samples, self.empty, self.one_target))
        samples, empty = sum(count[0] for count in counts), sum(count[1] for count in counts)
        results = self.metric.compute()
        if self.beside is not None and any(count[2] for count in counts) and empty < samples:
            results = {**results, **self.beside.compute()}
        scores = {name: float(value) for name, value in results.items() if value.ndim == 0}
        return {**scores, "samples": float(samples), "no_target_share": 100.0 * empty / max(samples, 1)}


def score_predictions(
    path: str | os.PathLike[str],
    dataset: Any,
    *,
    metric: Any = None,
    no_target_threshold: float | None = 0.5,
    sweep: ThresholdSweep | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Score anyone's predictions with a benchmark's own rules.

    The numbers are those that :func:`gresbox.training.evaluate` had when it wrote the file, to the last bit, and do not depend on
    the order of the lines.

    Args:
        path: A file that :class:`PredictionFile` reads.
        dataset: The split that the file answers, at the size of its masks; opened with ``images=False`` it needs no pictures.
        metric: A name in :data:`METRICS` or a metric, as for :class:`Scorer`; None: the benchmark's.
        no_target_threshold: The answer is "nothing" above this probability; in [0, 1]. None: the metric's own rule decides.
        sweep: Is given the same answers.
        limit: The file answers the first expressions only; None: all.
        progress: Show a progress bar.

    Returns:
        The metric's numbers, in percent, and ``samples`` and ``no_target_share``, the share of no-target samples in percent.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not of the form, does not answer this data set, or lacks what the metric reads; the message names
            the line.

    Example:
        >>> import tempfile
        >>> from gresbox.data import SyntheticGRES
        >>> from gresbox.training import PredictionWriter
        >>> data = SyntheticGRES("val", 5)
        >>> path = f"{tempfile.mkdtemp()}/truth.jsonl"
        >>> with PredictionWriter(path) as writer:
        ...     writer.add([Answer(sample.sent_id, sample.target.merged, float(sample.target.no_target)) for sample in data])
        >>> scores = score_predictions(path, data)
        >>> scores["gIoU"], scores["samples"]
        (100.0, 5.0)
    """
    if limit is not None:
        check_range("score_predictions", "limit", limit, 1)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    scorer = Scorer(dataset, metric, no_target_threshold=no_target_threshold, sweep=sweep)
    file = PredictionFile(path)
    name = type(scorer.metric).__name__
    for field in ("boxes", "scores") if scorer.reads_boxes else ("mask",):
        file.require(field, f"which {name} reads")
    if sweep is not None:
        file.require("no_target", 'the probability of "nothing" that a sweep of its threshold needs')
        file.require("mask", "which a sweep of the threshold scores")
    about = [_about(dataset, index) for index in range(total)]
    places = file.places([(one.ref_id, one.sent_id) for one in about])
    starts = range(0, total, _CHUNK)
    for start in progress_bar(iterable=starts, desc="score", unit="batch", leave=False) if progress else starts:
        indices = range(start, min(start + _CHUNK, total))
        truths = [_truth(dataset, index) for index in indices]
        answers = [file.answer(places[index], _size(truth)) for index, truth in zip(indices, truths, strict=True)]
        scorer.add(answers, truths, indices)
    return scorer.compute()


@dataclass(frozen=True)
class _Batch:
    """Some answers and truths, in the forms that metrics take."""

    answers: Sequence[Answer]
    truths: Sequence[Truth]
    places: Sequence[int]
    nothing: Sequence[bool] | None
    device: torch.device

    @property
    def masks(self) -> list[Tensor]:
        """As predicted, whatever the answer is."""
        return [_of(answer.mask) for answer in self.answers]

    @property
    def shown(self) -> list[Tensor]:
        """Empty where the answer is "nothing"."""
        if self.nothing is None:
            return self.masks
        return [mask & (not nothing) for mask, nothing in zip(self.masks, self.nothing, strict=True)]

    @property
    def flags(self) -> Tensor | None:
        """Whether the answer is "nothing"; None: the metric decides."""
        return None if self.nothing is None else torch.tensor(self.nothing, device=self.device)

    @property
    def targets(self) -> list[Tensor]:
        return [truth.mask.to(self.device) for truth in self.truths]

    @property
    def no_target(self) -> Tensor:
        return torch.tensor([truth.no_target for truth in self.truths], device=self.device)

    def chosen(self, wanted: Sequence[bool]) -> _Batch:
        """Only the wanted ones."""
        kept = [place for place, want in enumerate(wanted) if want]
        answers, truths, places = ([part[place] for place in kept] for part in (self.answers, self.truths, self.places))
        nothing = None if self.nothing is None else [self.nothing[place] for place in kept]
        return _Batch(answers, truths, places, nothing, self.device)  # type: ignore[arg-type]


def _nothing(answers: Sequence[Answer], threshold: float | None) -> list[bool] | None:
    """Whether each answer is "nothing"; None: the metric decides."""
    probabilities = [answer.no_target for answer in answers]
    if threshold is None or None in probabilities:
        return None
    return [probability > threshold for probability in probabilities if probability is not None]


def _feed(metric: Any, batch: _Batch) -> None:
    for kind, feed in _FEEDS.items():
        if isinstance(metric, kind):
            feed(metric, batch)
            return
    metric.update(batch.masks, batch.targets, batch.flags, batch.no_target)


def _feed_gres(metric: Any, batch: _Batch) -> None:
    metric.update(batch.masks, batch.targets, batch.flags, batch.no_target, sample_ids=batch.places)


def _feed_res(metric: Any, batch: _Batch) -> None:
    without = [truth.sent_id for truth in batch.truths if truth.no_target]
    if without:
        raise ValueError(
            f"RESMetric: `metric` must not be 'res' where an expression has no target, got sent_id {without[0]} without one;"
            " 'gres' scores both."
        )
    if batch.answers:
        metric.update(batch.shown, batch.targets, sample_ids=batch.places)


def _feed_refzom(metric: Any, batch: _Batch) -> None:
    metric.update(batch.shown, batch.targets, [truth.kind for truth in batch.truths], sample_ids=batch.places)


def _feed_rrefcoco(metric: Any, batch: _Batch) -> None:
    exists = torch.tensor([truth.exists for truth in batch.truths], device=batch.device)
    groups = [truth.ref_id for truth in batch.truths]
    metric.update(batch.masks, batch.targets, exists, groups, batch.flags, sample_ids=batch.places)


def _feed_grec(metric: Any, batch: _Batch) -> None:
    found = []
    for place, answer in enumerate(batch.answers):
        keep = slice(0 if batch.nothing is not None and batch.nothing[place] else None)
        found.append({"boxes_xyxy": _of(answer.boxes_xyxy)[keep], "scores": _of(answer.scores)[keep]})
    metric.update(found, [truth.boxes_xyxy for truth in batch.truths], batch.no_target.cpu(), sample_ids=batch.places)


def _feed_sweep(sweep: ThresholdSweep, batch: _Batch) -> None:
    scores = [answer.no_target for answer in batch.answers]
    if None in scores:
        raise ValueError('Scorer: `sweep` must be None where answers have no probability of "nothing", got a ThresholdSweep.')
    values = torch.tensor(scores, dtype=torch.float64, device=batch.device)
    sweep.update(batch.masks, batch.targets, values, batch.no_target, sample_ids=batch.places)


_FEEDS: dict[type[Any], Callable[[Any, _Batch], None]] = {
    GRESMetric: _feed_gres,
    RESMetric: _feed_res,
    RefZOMMetric: _feed_refzom,
    RRefCOCOMetric: _feed_rrefcoco,
    GRECMetric: _feed_grec,
}


def _whole(dataset: Any) -> Any:
    """What a subset is a subset of."""
    while not hasattr(dataset, "benchmark") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _annotated(truth: Truth, boxes: Tensor | None) -> Truth:
    """The truth with the benchmark's own boxes, if it has any."""
    if boxes is None or truth.no_target:
        return truth
    height, width = truth.mask.shape
    return truth._replace(boxes_xyxy=(boxes * torch.tensor([width, height, width, height])).float())


def _metrics_of(dataset: Any) -> tuple[str, tuple[str, ...]]:
    """What a data set is called, its own metric, and others that its expressions can answer."""
    dataset = _whole(dataset)
    if isinstance(dataset, SyntheticGRES):
        return "the synthetic benchmark", ("gres", "grec", "refzom")
    benchmark = getattr(dataset, "benchmark", None)
    if benchmark is None:
        return "data of one's own", ("gres", "grec", "refzom", "res", "rrefcoco")
    own = {"grefcoco": "gres", "ref-zom": "refzom"}.get(benchmark.folder, "rrefcoco" if benchmark.folder[:2] == "rr" else "res")
    others = {"gres": ("grec", "refzom")}.get(own, ("gres", "grec"))
    return benchmark.title, (own, *others)


def _about(dataset: Any, index: int) -> Any:
    return dataset.info(index) if hasattr(dataset, "info") else dataset[index]


def _truth(dataset: Any, index: int) -> Truth:
    if hasattr(dataset, "info") and getattr(dataset, "transform", None) is None:
        return truth_of(dataset.target(index), dataset.info(index))  # no picture is read
    sample = dataset[index]
    return truth_of(sample.target, sample)


def _size(truth: Truth) -> tuple[int, int]:
    return truth.mask.shape[0], truth.mask.shape[1]


def _of(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("Scorer: `answers` must have what the metric reads, got one without it.")
    return value
