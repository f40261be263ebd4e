"""The order in which samples are seen: a function of the seed and the step alone.

An endless row of shuffled epochs is cut into optimiser steps, each step into micro-batches, each micro-batch into the processes'
shares. So the samples of a step do not depend on how many processes or accumulation steps share the work, no sample is dropped
or repeated within an epoch, and the step number is all that has to be remembered to continue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["StepOrder"]


@dataclass(frozen=True)
class StepOrder(Sampler[list[tuple[int, int]]]):
    """The batches of one process, as lists of ``(position, index)``: the place in the endless row and the sample there.

    Args:
        length: Samples of the data set.
        batch: Samples per optimiser step, over all processes and accumulation steps.
        steps: Optimiser steps of the whole training.
        accumulate: Micro-batches per optimiser step.
        rank: This process.
        world: Number of processes.
        seed: Seed of the shuffling.
        start: The first optimiser step to give out.

    Raises:
        ValueError: If the data set is empty or the batch cannot be shared out evenly.

    Example:
        >>> whole = StepOrder(10, 4, 3, seed=1)
        >>> shares = [StepOrder(10, 4, 3, rank=rank, world=2, seed=1) for rank in range(2)]
        >>> [a + b for a, b in zip(*shares)] == list(whole)
        True
    """

    length: int
    batch: int
    steps: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("train: `train_set` must hold at least one sample, got none.")
        if self.batch < 1 or self.batch % (self.accumulate * self.world):
            raise ValueError(
                f"train: `batch` must be a multiple of processes x accumulate = {self.world} x {self.accumulate}, got {self.batch}."
            )

    @property
    def share(self) -> int:
        """Samples of one micro-batch of one process."""
        return self.batch // (self.accumulate * self.world)

    def __len__(self) -> int:
        return max(self.steps - self.start, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known: dict[int, Tensor] = {}
        for step in range(self.start, self.steps):
            for micro in range(self.accumulate):
                first = step * self.batch + (micro * self.world + self.rank) * self.share
                yield [(place, self._sample_at(place, known)) for place in range(first, first + self.share)]

    def _sample_at(self, place: int, known: dict[int, Tensor]) -> int:
        epoch, offset = divmod(place, self.length)
        if epoch not in known:
            known.pop(epoch - 2, None)  # a step may reach back over one border only
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            known[epoch] = torch.randperm(self.length, generator=generator)
        return int(known[epoch][offset])
