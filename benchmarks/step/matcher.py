"""Matching of queries and targets, from embeddings and pixels: in one pass, or layer by layer and image by image.

The error is what the found matching costs beyond the best one, as a share, priced in float64 on all pixels; so it also says what
sampling points gives away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Cost, Form, Target, attempt, compiled, missing
from benchmarks.peers.mask2former import area_average, assign_exactly, match_layer, solve
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.structures import GresTarget, InstancePrediction, PaddedTargets

SIZES = {"N": 100, "C": 256, "H": 120, "image": 480}
CASES = {
    "4 images": {"S": 1, "B": 4, **SIZES},
    "4 images, 10 steps": {"S": 10, "B": 4, **SIZES},
    "32 images, 10 steps": {"S": 10, "B": 32, **SIZES},
}
ON = {"cpu": ("4 images", "4 images, 10 steps"), "cuda": ("32 images, 10 steps", "4 images")}
DIFFERENTIABLE = ()
COUNTS = (1, 3, 5, 10)
MOST = max(COUNTS)  # places per image where targets are padded, as a CUDA graph needs them
SCORE, MASK = 2.0, 5.0


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    drawn = partial(torch.randn, generator=generator, device=device)
    counts = [COUNTS[index % len(COUNTS)] for index in range(case["B"])]
    if case["B"] > len(COUNTS):
        counts[0] = 0
    coarse = [drawn(count, 1, 9, 9) for count in counts]
    side = case["image"]
    return {
        "embeddings": 0.1 * drawn(case["S"], case["B"], case["N"], case["C"]).to(dtype),
        "pixels": drawn(case["B"], case["C"], case["H"], case["H"]).to(dtype),
        "scores": drawn(case["S"], case["B"], case["N"]).to(dtype),
        "targets": [
            (F.interpolate(part, size=(side, side), mode="bilinear")[:, 0] if len(part) else part.new_zeros(0, side, side)) > 0.3
            for part in coarse
        ],
    }


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    sampled = "random points"
    return {
        "gresbox": Form(match_with(None), prepare=as_structures),
        "gresbox, padded targets": Form(match_with(None), prepare=as_padded) if device == "cuda" else "it is for CUDA graphs",
        "gresbox, 3136 points": Form(match_with(3136), prepare=as_structures, differs=sampled),
        "gresbox, 12544 points": Form(match_with(12544), prepare=as_structures, differs=sampled),
        "Mask2Former's way, all pixels": missing("scipy") or partial(match_by_layers, num_points=None),
        "Mask2Former's way": missing("scipy") or Form(partial(match_by_layers, num_points=12544), differs="12544 random points"),
        "Mask2Former's way, vectorised, compiled": missing("scipy") or Form(match_at_once(), prepare=as_tensors),
        "transformers": missing("transformers") or missing("scipy") or attempt(transformers_form),
    }


def as_structures(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor]) -> dict[str, Any]:
    steps = tuple(
        InstancePrediction(score, step, pixels, step, step[:, :1]) for score, step in zip(scores, embeddings, strict=True)
    )
    return {"steps": steps, "truth": [GresTarget(masks) for masks in targets]}


def as_padded(targets: list[Tensor], **inputs: Tensor) -> dict[str, Any]:
    made = as_structures(**inputs, targets=targets)
    return {**made, "truth": PaddedTargets.pack(made["truth"], MOST)}


def as_tensors(targets: list[Tensor], **inputs: Tensor) -> dict[str, Any]:
    padded = PaddedTargets.pack([GresTarget(masks) for masks in targets], MOST)
    return {**inputs, "truth": padded.masks, "counts": [len(masks) for masks in targets]}


def match_with(num_points: int | None) -> Callable[..., Tensor]:
    matcher = HungarianInstanceMatcher(score=SCORE, mask=MASK, phrase=0.0, num_points=num_points)
    return lambda steps, truth: matcher.match_steps(steps, truth)


def match_by_layers(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor], num_points: int | None) -> Tensor:
    most = max(len(masks) for masks in targets)
    found = torch.full((*scores.shape[:2], most), -1)
    for place, step, score in zip(found, embeddings, scores, strict=True):
        masks, score = (widened(value) for value in (torch.einsum("bnc,bchw->bnhw", step, pixels), score))
        pairs = match_layer(score, masks, targets, score=SCORE, mask=MASK, num_points=num_points)
        for row, (queries, columns) in zip(place, pairs, strict=True):
            row[columns] = queries
    return found


def widened(values: Tensor) -> Tensor:
    """As Mask2Former's matcher does before it prices masks; SciPy knows no bfloat16 either."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def match_at_once() -> Callable[..., Tensor]:
    """All steps' and images' costs in one compiled pass, all pixels; one copy from the device, and SciPy."""
    price = compiled(price_at_once)

    def call(embeddings: Tensor, pixels: Tensor, scores: Tensor, truth: Tensor, counts: list[int]) -> Tensor:
        found = torch.full((*scores.shape[:2], truth.shape[1]), -1)
        costs = price(embeddings=embeddings, pixels=pixels, scores=scores, truth=truth).cpu()
        for place, of_images in zip(found, costs, strict=True):
            for row, cost, count in zip(place, of_images, counts, strict=True):
                queries, columns = solve(cost[:, :count])
                row[columns] = queries
        return found

    return call


def price_at_once(embeddings: Tensor, pixels: Tensor, scores: Tensor, truth: Tensor) -> Tensor:
    """``(S, B, N, M)``: masks of all steps and images are built at one time, with one softplus and two products."""
    covered = F.interpolate(truth.float(), size=pixels.shape[-2:], mode="area").flatten(2).mT  # (B, P, M)
    masks = widened(embeddings.transpose(0, 1).flatten(1, 2) @ pixels.flatten(2))  # (B, S * N, P)
    bce = (F.softplus(masks).sum(-1, keepdim=True) - masks @ covered) / masks.shape[-1]
    probs = masks.sigmoid()
    dice = 1 - (2 * probs @ covered + 1) / (probs.sum(-1, keepdim=True) + covered.sum(1, keepdim=True) + 1)
    pairs = MASK * (bce + dice).unflatten(1, (embeddings.shape[0], -1)).transpose(0, 1)
    return pairs + SCORE * F.softplus(-widened(scores))[..., None]


def transformers_form() -> Form:
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

    matcher = Mask2FormerHungarianMatcher(cost_class=SCORE, cost_mask=MASK, cost_dice=MASK, num_points=12544)

    def call(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor]) -> list[Any]:
        labels = [torch.zeros(len(masks), dtype=torch.int64, device=pixels.device) for masks in targets]
        found = []
        for step, score in zip(embeddings, scores, strict=True):
            masks, score = (widened(value) for value in (torch.einsum("bnc,bchw->bnhw", step, pixels), score))
            classes = torch.stack([score, torch.zeros_like(score)], -1)
            found.append(matcher(masks, classes, targets, labels))
        return found

    def read(found: list[Any]) -> Tensor:
        most = max(len(columns) for pairs in found for _, columns in pairs)
        rows = torch.full((len(found), len(found[0]), most), -1)
        for place, pairs in zip(rows, found, strict=True):
            for row, (queries, columns) in zip(place, pairs, strict=True):
                row[columns] = queries
        return rows

    return Form(call, read=read, differs="12544 random points; the score cost is a probability")


def costs(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor]) -> list[list[Tensor]]:
    """Every pair's cost in float64, per step and image ``(N, M)``."""
    found = []
    for step, score in zip(embeddings.double(), scores.double(), strict=True):
        of_images = []
        for queries, features, logits, masks in zip(step, pixels, score, targets, strict=True):
            predicted = queries @ features.double().flatten(1)  # (N, P)
            truth = area_average(masks, features.shape[-2:]).double().flatten(1)
            probs = predicted.sigmoid()
            bce = (F.softplus(predicted).sum(-1, keepdim=True) - predicted @ truth.T) / predicted.shape[1]
            dice = 1 - (2 * probs @ truth.T + 1) / (probs.sum(-1, keepdim=True) + truth.sum(-1) + 1)
            of_images.append(SCORE * F.softplus(-logits)[:, None] + MASK * (bce + dice))
        found.append(of_images)
    return found


def reference(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor]) -> Tensor:
    most = max(len(masks) for masks in targets)
    rows = torch.full((*scores.shape[:2], most), -1)
    for place, of_images in zip(rows, costs(embeddings, pixels, scores, targets), strict=True):
        for row, cost in zip(place, of_images, strict=True):
            row[: cost.shape[1]] = torch.from_numpy(assign_exactly(cost.cpu().numpy()))
    return rows


def error(got: list[Tensor], wanted: list[Tensor], inputs: dict[str, Any]) -> float:
    """The extra cost as a share of the best cost; infinite where a target has no query or two have one."""
    extra = best = 0.0
    for found, right, of_images in zip(got[0].cpu(), wanted[0], costs(**inputs), strict=True):
        for row, best_row, cost in zip(found, right, of_images, strict=True):
            count = cost.shape[1]
            if len(set(row[:count].tolist()) - {-1}) < count or (row[count:] != -1).any():
                return float("inf")
            columns = torch.arange(count)
            best += float(cost.cpu()[best_row[:count], columns].sum())
            extra += float(cost.cpu()[row[:count], columns].sum())
    return max(0.0, extra / best - 1)


def cost(case: dict[str, int], itemsize: int, direction: str) -> Cost:
    """Masks of all queries once, two products with the targets, one pass over the features and the targets."""
    area, queries = case["H"] ** 2, case["S"] * case["N"]
    mean = sum(COUNTS) / len(COUNTS)
    flops = case["B"] * area * queries * (2 * case["C"] + 4 * mean)
    return Cost(flops=flops, bytes=case["B"] * area * (case["C"] * itemsize + mean))


ALL_AT_ONCE: dict[str, Any] = {"case": "32 images, 10 steps", "direction": "forward", "device": "cuda"}
TARGETS = [
    Target("gresbox", "transformers", "4 images", "forward", at_least=1.7),
    Target("gresbox, 3136 points", "transformers", "4 images", "forward", at_least=3.0, note="at a quarter of its 12,544 points"),
    Target("gresbox, padded targets", "Mask2Former's way", at_least=50.0, syncs_at_most=0, **ALL_AT_ONCE),
    Target("gresbox, padded targets", "Mask2Former's way, vectorised, compiled", at_least=4.0, **ALL_AT_ONCE),
]

NOTES = (
    "With points and one step, reading 256 channels of four images at 3,136 of them is the largest part: 11 ms with an "
    "image's pixels laid out as rows, 17 ms map by map, 39 ms with all channels of a point at once, 23 ms by "
    "index_select, 33 ms by gather, 40 ms as a sparse product. Ten steps share it. In a shorter run an hour before this "
    "one 3,136 points were 2.39x of transformers with one step."
)
