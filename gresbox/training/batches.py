"""From samples to a model's batches: what runs in the data workers.

Pictures go through the model's own processor, in training as in prediction. Targets travel packed, a few tensors per batch instead
of a few per sample, because each tensor that leaves a worker process costs a file handle and a fraction of a millisecond.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gresbox.data.transforms import resize_masks
from gresbox.ops import box_cxcywh_to_xyxy
from gresbox.structures import GresSample, GresTarget
from gresbox.training.randomness import seed_random

__all__ = [
    "EvaluationBatch",
    "EvaluationCollate",
    "TrainingBatch",
    "TrainingCollate",
    "Truth",
    "make_loader",
    "resize_target",
    "truth_of",
]


class Truth(NamedTuple):
    """What a benchmark knows of one expression, at the size of scoring.

    Args:
        mask: Everything that is referred to, ``(H, W)`` bool.
        boxes_xyxy: One box per referred instance, ``(M, 4)`` float32, in pixels of that size.
        no_target: Whether the expression refers to nothing.
        kind: ``"one"``, ``"many"`` or ``"zero"``.
        exists: Whether the expression is true of the picture.
        ref_id: The reference that the expression belongs to.
        sent_id: The expression's id.
    """

    mask: Tensor
    boxes_xyxy: Tensor
    no_target: bool
    kind: str
    exists: bool
    ref_id: int
    sent_id: int


def truth_of(target: GresTarget, about: Any) -> Truth:
    """Put the truth of one expression together.

    Args:
        target: What the expression refers to.
        about: A :class:`gresbox.structures.GresSample`, or what a dataset's ``info`` gives: ``kind``, ``exists`` and ids are read.

    Example:
        >>> sample = GresSample(torch.zeros(3, 4, 8), "it", GresTarget(torch.ones(1, 4, 8, dtype=torch.bool)), sent_id=7)
        >>> truth_of(sample.target, sample)[1:]
        (tensor([[0., 0., 8., 4.]]), False, 'one', True, 0, 7)
    """
    mask = _of(target.merged)
    scale = torch.tensor([mask.shape[1], mask.shape[0]], dtype=torch.float64).repeat(2)
    boxes = (box_cxcywh_to_xyxy(_of(target.boxes).double()) * scale).float()
    return Truth(mask, boxes, bool(target.no_target), about.kind, about.exists, about.ref_id, about.sent_id)


def resize_target(target: GresTarget, size: tuple[int, int]) -> GresTarget:
    """The same target on another pixel grid, by area; no instance vanishes. Boxes, being relative, and flags stay as they are.

    Args:
        target: What an expression refers to.
        size: Height and width, in pixels.

    Example:
        >>> target = GresTarget(torch.eye(4, dtype=torch.bool)[None])
        >>> tuple(resize_target(target, (8, 6)).masks.shape)
        (1, 8, 6)
    """
    if target.masks.shape[-2:] == size:
        return target
    assert target.merged is not None  # filled in by GresTarget
    masks = resize_masks(torch.cat([target.masks, target.merged[None]]), size)
    return replace(target, masks=masks[:-1], merged=masks[-1])


@dataclass(frozen=True)
class TrainingBatch:
    """Inputs and packed targets of one micro-batch; the instances of all samples lie behind each other.

    Args:
        inputs: What the model takes, from its processor.
        masks: All instances.
        boxes: Their boxes.
        merged: The whole referred region of each sample.
        counts: Instances of each sample.
        no_target: Whether each expression refers to nothing.

    Shape:
        - ``masks``: ``(sum M, H, W)`` bool; ``boxes``: ``(sum M, 4)``; ``merged``: ``(B, H, W)`` bool.
    """

    inputs: dict[str, Tensor]
    masks: Tensor
    boxes: Tensor
    merged: Tensor
    counts: list[int]
    no_target: list[bool]

    def on(self, device: torch.device) -> tuple[dict[str, Tensor], list[GresTarget]]:
        """Inputs and one target per sample, on a device."""
        masks, boxes, merged = (part.to(device, non_blocking=True) for part in (self.masks, self.boxes, self.merged))
        parts = zip(masks.split(self.counts), boxes.split(self.counts), merged, self.no_target, strict=True)
        targets = [GresTarget(mask, box, merged=union, no_target=empty) for mask, box, union, empty in parts]
        return {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}, targets


@dataclass(frozen=True)
class EvaluationBatch:
    """Inputs of one evaluation batch and the truth at the size of scoring.

    Args:
        inputs: What the model takes, from its processor.
        texts: The expressions.
        truths: What the benchmark knows of each sample.
    """

    inputs: dict[str, Tensor]
    texts: list[str]
    truths: list[Truth]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of scoring, per sample."""
        return [(truth.mask.shape[0], truth.mask.shape[1]) for truth in self.truths]


@dataclass(frozen=True)
class TrainingCollate:
    """Samples to a :class:`TrainingBatch`.

    Args:
        processor: The model's; its ``image_size`` is the side that targets are resized to.
    """

    processor: Any

    def __call__(self, samples: Sequence[GresSample]) -> TrainingBatch:
        size = (self.processor.image_size, self.processor.image_size)
        targets = [resize_target(sample.target, size) for sample in samples]
        return TrainingBatch(
            inputs=self.processor(images=[sample.image for sample in samples], texts=[sample.text for sample in samples]),
            masks=torch.cat([target.masks for target in targets]),
            boxes=torch.cat([_of(target.boxes) for target in targets]),
            merged=torch.stack([_of(target.merged) for target in targets]),
            counts=[target.masks.shape[0] for target in targets],
            no_target=[bool(target.no_target) for target in targets],
        )


@dataclass(frozen=True)
class EvaluationCollate:
    """Samples to an :class:`EvaluationBatch`.

    Args:
        processor: The model's.
        resized: Score on the model's input square instead of the picture's own size.
    """

    processor: Any
    resized: bool = False

    def __call__(self, samples: Sequence[GresSample]) -> EvaluationBatch:
        targets = [sample.target for sample in samples]
        if self.resized:
            targets = [resize_target(target, (self.processor.image_size, self.processor.image_size)) for target in targets]
        return EvaluationBatch(
            inputs=self.processor(images=[sample.image for sample in samples], texts=[sample.text for sample in samples]),
            texts=[sample.text for sample in samples],
            truths=[truth_of(target, sample) for target, sample in zip(targets, samples, strict=True)],
        )


def make_loader(
    dataset: Any, batches: Iterable[list[tuple[int, int]]], collate: Any, *, workers: int = 0, seed: int = 0
) -> DataLoader:
    """Load batches given as lists of ``(position, index)``.

    A worker seeds the global generators from the position before it fetches a sample, so a data set that draws random numbers gives
    the same sample whichever worker fetches it and wherever a training was interrupted. Without workers the process's own
    generators run on; they are part of a checkpoint.

    Args:
        dataset: Has ``[index]``.
        batches: For each batch, the samples to fetch.
        collate: Makes a batch of a list of samples.
        workers: Processes that fetch; 0: this one does.
        seed: Mixed into the position.
    """
    # A batch of short texts is tokenised faster by one thread; more would also get in the way of PyTorch's, and of forked workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        _Placed(dataset, seed),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # the loader would draw from the global generator otherwise
        persistent_workers=False,
    )


@dataclass(frozen=True)
class _Placed(Dataset[Any]):
    dataset: Any
    seed: int

    def __getitem__(self, place: tuple[int, int]) -> Any:
        position, index = place
        if get_worker_info() is not None:
            seed_random(self.seed * 1_000_003 + position)
        return self.dataset[index]


def _of(value: Tensor | None) -> Tensor:
    assert value is not None  # GresTarget fills boxes and merged in
    return value
