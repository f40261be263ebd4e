"""Update every metric on a share of the same samples, in one process or in several that work together; prints the results.

The samples are dealt as torch's DistributedSampler does: filled up with repeated ones, so that all processes get as many.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from gresbox.metrics import (
    CoverageAccuracy,
    GRECMetric,
    GRESMetric,
    RefZOMMetric,
    RESMetric,
    RRefCOCOMetric,
    ThresholdSweep,
)

Samples = dict[str, Any]
KINDS = ("one", "many", "zero")


@dataclass(frozen=True)
class Subject:
    """A metric, the arguments it takes of a batch, and the function that does the same."""

    build: Callable[..., Metric]
    takes: tuple[str, ...]
    function: str


SUBJECTS = {
    "gres": Subject(GRESMetric, ("pred", "target", "says_none", "is_none"), "gres_metrics"),
    "grec": Subject(GRECMetric, ("found", "boxes"), "grec_metrics"),
    "refzom": Subject(RefZOMMetric, ("pred", "target", "kind"), "refzom_metrics"),
    "rrefcoco": Subject(RRefCOCOMetric, ("pred", "target", "exists", "group"), "rrefcoco_metrics"),
    "res": Subject(RESMetric, ("pred", "target"), "res_metrics"),
    "coverage": Subject(CoverageAccuracy, ("points", "relative"), "coverage_accuracy"),
    "threshold": Subject(ThresholdSweep, ("pred", "target", "score", "is_none"), "sweep_thresholds"),
}


def make_samples(count: int, seed: int = 0) -> Samples:
    """Random masks of different sizes, boxes and scores; some are empty, and every group has a true and a false sentence."""
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    def rand_boxes(size: int) -> Tensor:
        return rand(size, 2, 2).sort(1).values.reshape(size, 4)

    sizes = [tuple(torch.randint(3, 9, (2,), generator=draw).tolist()) for _ in range(count)]
    kind = [KINDS[int(place)] for place in torch.randint(0, 3, (count,), generator=draw)]
    exists = torch.arange(count) % 2 == 0
    target = [rand(*size) < (0.0 if name == "zero" else 0.5) for size, name in zip(sizes, kind, strict=True)]
    corners = [rand_boxes(0 if name == "zero" else 1 + place % 3) for place, name in enumerate(kind)]
    found = []
    for boxes in corners:
        moved = (boxes + 0.02 * rand(len(boxes), 1))[torch.randperm(len(boxes), generator=draw)]
        scores = torch.cat([1 - 0.4 * rand(len(boxes)), 0.8 * rand(2)])
        found.append({"boxes_xyxy": torch.cat([moved, rand_boxes(2)]), "scores": scores})
    return {
        "pred": [rand(*size) < 0.5 * int(rand(1) < 0.8) for size in sizes],
        "target": [mask if bool(mask.any()) or name == "zero" else ~mask for mask, name in zip(target, kind, strict=True)],
        "says_none": rand(count) < 0.4,
        "is_none": torch.tensor([name == "zero" for name in kind]),
        "kind": kind,
        "exists": exists,
        "group": torch.arange(count) // 2 + 2**60,  # ids that float64 cannot hold
        "score": rand(count).mul(20).round().div(20),  # with ties
        "found": found,
        "boxes": corners,
        "points": rand(count, 6, 2),
        "relative": [torch.cat([(part[:, :2] + part[:, 2:]) / 2, part[:, 2:] - part[:, :2]], 1) for part in corners],
        "sample_ids": 2**60 + torch.randperm(count, generator=draw),
    }


def taken(samples: Samples, names: tuple[str, ...], index: list[int]) -> list[Any]:
    """The named columns of some samples."""
    return [value[index] if isinstance(value := samples[name], Tensor) else [value[place] for place in index] for name in names]


def batches(index: list[int], size: int) -> Iterator[list[int]]:
    return (index[start : start + size] for start in range(0, len(index), size))


def results(metric: Metric) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: value.tolist() for name, value in metric.compute().items()}


def run(rank: int, world: int) -> dict[str, Any]:
    """Every metric's results: of samples that were dealt with repetition, and of three samples that one process has alone."""
    count = 23
    samples = make_samples(count)
    filled = [place % count for place in range(-(-count // world) * world)]
    share = filled[rank::world]
    outcome: dict[str, Any] = {}
    for name, subject in SUBJECTS.items():
        metric = subject.build()
        for part in batches(share, 4):
            metric.update(*taken(samples, subject.takes, part), sample_ids=samples["sample_ids"][part])
        outcome[name] = results(metric)
        metric.reset()
        alone = subject.build(per_sample=True)
        if rank == 0:
            alone.update(*taken(samples, subject.takes, [0, 1, 2]))
        outcome[f"{name} alone"] = results(alone)
        plain = subject.build()
        for part in batches(list(range(rank, count, world)), 3):
            plain.update(*taken(samples, subject.takes, part))
        outcome[f"{name} dealt without repetition"] = results(plain)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("meeting", help="a file that does not exist yet, where the processes find each other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{options.meeting}", rank=options.rank, world_size=options.world
    )
    print(json.dumps(run(options.rank, options.world)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
