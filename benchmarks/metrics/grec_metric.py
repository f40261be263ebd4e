"""Updates of GRECMetric against the official evaluator's greedy loop, on 100 predicted boxes per expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Form, Target
from benchmarks.peers.metrics import grec_expression
from gresbox.metrics import GRECMetric

BOXES = 100
CASES = {
    f"{words}, batch {batch}": {"B": batch, "true": true, "kept": kept}
    for batch in (1, 8, 16)
    for words, true, kept in (("3 kept, 3 true", 3, 3), ("uniform scores, 3 true", 3, -1), ("100 kept, 100 true", 100, 100))
}
ON = {"cpu": tuple(CASES), "cuda": ()}
DIFFERENTIABLE = ()


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Scores, boxes near the true ones, true boxes; ``kept`` scores lie above 0.7, -1: scores are uniform."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(case["B"]):
        centre, side = rng.uniform(50, 430, (case["true"], 2)), rng.uniform(20, 120, (case["true"], 2))
        truth = np.concatenate([centre - side / 2, centre + side / 2], 1)
        near = truth[np.arange(BOXES) % case["true"]] + rng.normal(0, 3, (BOXES, 1))
        scores = rng.uniform(0, 1, BOXES)
        if case["kept"] >= 0:
            scores = np.where(np.arange(BOXES) < case["kept"], 0.71 + 0.29 * scores, 0.6 * scores)
        found.append(tuple(part.astype(np.float32) for part in (scores, near, truth)))
    return {"expressions": found}


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    metric = GRECMetric(protocol="instancevg")

    def tensors(expressions: list[tuple[np.ndarray, ...]]) -> dict[str, Any]:
        found = [{"boxes_xyxy": torch.from_numpy(boxes), "scores": torch.from_numpy(scores)} for scores, boxes, _ in expressions]
        return {"found": found, "truth": [torch.from_numpy(boxes) for *_, boxes in expressions]}

    def update(found: list[dict[str, Tensor]], truth: list[Tensor]) -> GRECMetric:
        metric.update(found, truth)
        return metric

    def greedy(expressions: list[tuple[np.ndarray, ...]]) -> list[tuple[int, int, float]]:
        return [grec_expression(*expression) for expression in expressions]

    return {
        "gresbox": Form(update, prepare=tensors, read=lambda metric: metric.compute()["F1"].double().reshape(1)),
        "greedy loop": Form(greedy, read=lambda rows: torch.tensor([100 * sum(row[2] == 1 for row in rows) / len(rows)])),
    }


def reference(expressions: list[tuple[np.ndarray, ...]]) -> Tensor:
    """The share of expressions whose kept boxes and true boxes all have a partner, by maximum matching where each has one near."""
    from scipy.optimize import linear_sum_assignment

    right = 0
    for scores, boxes, truth in expressions:
        kept = torch.from_numpy(boxes[scores >= 0.7]).double()
        overlap = generalised_iou(kept, torch.from_numpy(truth).double())
        rows, columns = linear_sum_assignment(-(overlap >= 0.5).double().numpy())
        right += len(kept) == len(truth) and bool((overlap[rows, columns] >= 0.5).all())
    return torch.tensor([100.0 * right / len(expressions)], dtype=torch.float64)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    around = torch.maximum(first[:, None, 2:], second[None, :, 2:]) - torch.minimum(first[:, None, :2], second[None, :, :2])
    shared = (high - low).clamp(min=0).prod(-1)
    joined = (first[:, 2:] - first[:, :2]).prod(-1)[:, None] + (second[:, 2:] - second[:, :2]).prod(-1) - shared
    return shared / joined - (around.prod(-1) - joined) / around.prod(-1)


TARGETS = [Target("gresbox", "greedy loop", case, "forward", at_least=3.33) for case in CASES]
NOTES = """\
One call has a cost that does not depend on its size, the sum of many small array operations; so batches of one expression gain
little. Matching is skipped where kept and true boxes differ in number, because such an expression cannot be right; with
`per_sample=True` it is done. `gresbox evaluate` goes in batches of 16.
"""
