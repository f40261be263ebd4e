"""What a training run is told beside the model's recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from gresbox._checks import check_choice, check_range
from gresbox.structures import Recipe
from gresbox.training.evaluation import EvaluationOptions
from gresbox.training.schedule import SCHEDULES

__all__ = ["TrainOptions"]

_OF_RECIPE = ("epochs", "batch", "lr", "clip", "amp", "schedule")


@dataclass(frozen=True)
class TrainOptions:
    """How long, how and where to train. Where a value is None, the model's recipe decides.

    Args:
        max_steps: Optimiser steps; the schedule ends there. Wins over ``epochs``.
        epochs: Passes over the training set.
        batch: Samples per optimiser step, over all processes and accumulation steps.
        lr: Peak learning rate.
        clip: Largest global gradient norm; 0: no clipping.
        amp: ``"no"``, ``"bf16"`` or ``"fp16"``.
        schedule: ``"linear"``, ``"step"``, ``"poly"``, ``"cosine"`` or ``"constant"``.
        accumulate: Micro-batches per optimiser step: the same result in less memory.
        seed: Seed of the data order and of everything random.
        workers: Processes per training process that load data; 0: it loads itself.
        max_seconds: Stop training after this much training time, wherever the schedule is; None: no limit.
        log_every: Steps between two entries of the log.
        evaluate_every: Steps between two evaluations; 0: only at the end.
        evaluate_start: Evaluate before the first step too.
        checkpoint_every: Steps between two checkpoints; 0: by the clock alone.
        checkpoint_seconds: Seconds between two checkpoints; 0: by steps alone.
        keep_checkpoints: How many of the newest stay.
        pictures: Answers to draw at the end, where matplotlib is installed; 0: draw nothing.
        tensorboard: Write TensorBoard scalars too.
        progress: Show a progress bar.
        cpu: Stay on the CPU where there is a GPU.
        capture: Record the model's second half, matching and losses as a CUDA graph with this many places for instances per
            picture, and replay it in every step; see :func:`gresbox.training.capture_step`. 0: no graph.
        evaluation: How to score.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> TrainOptions(max_steps=10, batch=4).applied_to(Recipe(lr=0.1)).batch
        4
    """

    max_steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    lr: float | None = None
    clip: float | None = None
    amp: str | None = None
    schedule: str | None = None
    accumulate: int = 1
    seed: int = 0
    workers: int = 0
    max_seconds: float | None = None
    log_every: int = 20
    evaluate_every: int = 0
    evaluate_start: bool = False
    checkpoint_every: int = 0
    checkpoint_seconds: float = 300.0
    keep_checkpoints: int = 2
    pictures: int = 8
    tensorboard: bool = False
    progress: bool = True
    cpu: bool = False
    capture: int = 0
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        smallest = {"accumulate": 1, "log_every": 1, "keep_checkpoints": 1, "max_steps": 1, "batch": 1}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                check_range("TrainOptions", item.name, value, smallest.get(item.name, 0))
        check_choice("TrainOptions", "amp", self.amp, (None, "no", "bf16", "fp16"))
        check_choice("TrainOptions", "schedule", self.schedule, (None, *SCHEDULES))

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with these options' numbers in place of its own."""
        given = {name: getattr(self, name) for name in _OF_RECIPE if getattr(self, name) is not None}
        return replace(recipe, **given)

    def total_steps(self, recipe: Recipe, samples: int) -> int:
        """Optimiser steps of the whole training."""
        if self.max_steps is not None:
            return self.max_steps
        return max(math.ceil(recipe.epochs * samples / recipe.batch), 1)
