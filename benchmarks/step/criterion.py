"""InstAlign's criterion, matching and losses of all decoder steps, forward and backward, against the loops over layers and images.

The error is that of the total loss and of its gradients. Every form computes all of InstAlign's terms on the same predictions;
transformers' loss knows neither phrases nor merged mask nor no-target flag and computes less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Form, Target, attempt, missing
from benchmarks.peers.mask2former import mask_losses_of_layer, match_layer
from benchmarks.step import matcher
from gresbox.losses import InstAlignCriterion, MaskLoss
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.ops import align_phrases
from gresbox.structures import GresOutput, GresTarget, InstancePrediction, PaddedTargets

SIZES = {"N": 100, "C": 256, "H": 120, "L": 20, "image": 480}
CASES = {
    "2 images, 4 steps": {"S": 4, "B": 2, **SIZES},
    "4 images": {"S": 10, "B": 4, **SIZES},
    "32 images": {"S": 10, "B": 32, **SIZES},
}
ON = {"cpu": ("2 images, 4 steps",), "cuda": ("32 images", "4 images")}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
DIFFERENTIABLE = ("embeddings", "pixels", "scores", "queries", "tokens", "merged", "no_target")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    drawn = partial(torch.randn, generator=generator, device=device)
    lengths = torch.randint(4, case["L"] + 1, (case["B"], 1), generator=generator, device=device)
    return {
        **matcher.make_inputs(case, device, dtype, generator),
        "queries": drawn(case["S"], case["B"], case["N"], case["C"]).to(dtype),
        "tokens": drawn(case["S"], case["B"], case["L"], case["C"]).to(dtype),
        "valid": torch.arange(case["L"], device=device) < lengths,
        "merged": drawn(case["B"], case["H"], case["H"]).to(dtype),
        "no_target": drawn(case["B"]).to(dtype),
    }


def output_of(
    embeddings: Tensor,
    pixels: Tensor,
    scores: Tensor,
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    merged: Tensor,
    no_target: Tensor,
) -> GresOutput:
    steps = [
        InstancePrediction(score, embedding, pixels, query, token, valid)
        for score, embedding, query, token in zip(scores, embeddings, queries, tokens, strict=True)
    ]
    return GresOutput(merged, no_target, steps[-1], tuple(steps[:-1]))


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    return {
        "gresbox": Form(criterion_with(None), prepare=with_truth),
        "gresbox, padded targets": Form(criterion_with(None), prepare=padded) if device == "cuda" else "it is for CUDA graphs",
        "gresbox, 12544 points": Form(criterion_with(12544), prepare=with_truth, differs="random points"),
        "Mask2Former's way, all pixels": missing("scipy") or partial(by_layers, num_points=None),
        "Mask2Former's way": missing("scipy") or Form(partial(by_layers, num_points=12544), differs="random points"),
        "transformers": missing("transformers")
        or missing("scipy")
        or attempt(lambda: Form(transformers_form(), differs="other terms, random points")),
    }


def with_truth(targets: list[Tensor], **inputs: Tensor) -> dict[str, Any]:
    return {**inputs, "truth": [GresTarget(masks) for masks in targets]}


def padded(targets: list[Tensor], **inputs: Tensor) -> dict[str, Any]:
    return {**inputs, "truth": PaddedTargets.pack([GresTarget(masks) for masks in targets], matcher.MOST)}


def criterion_with(num_points: int | None) -> Callable[..., Tensor]:
    mask_loss = MaskLoss() if num_points is None else MaskLoss(num_points)
    criterion = InstAlignCriterion(HungarianInstanceMatcher(num_points=num_points), mask_loss=mask_loss)

    def call(truth: list[GresTarget] | PaddedTargets, **inputs: Tensor) -> Tensor:
        return criterion(output_of(**inputs), truth)["loss"]

    return call


def by_layers(
    embeddings: Tensor,
    pixels: Tensor,
    scores: Tensor,
    targets: list[Tensor],
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    merged: Tensor,
    no_target: Tensor,
    num_points: int | None,
) -> Tensor:
    """InstAlign's terms with the default weights, layer by layer; every layer builds all its masks."""
    kind = torch.promote_types(embeddings.dtype, torch.float32)
    embeddings, pixels, scores, queries, tokens, merged, no_target = (
        value.to(kind) for value in (embeddings, pixels, scores, queries, tokens, merged, no_target)
    )
    normaliser = float(max(sum(len(masks) for masks in targets), 1))
    total = whole_picture(merged, no_target, targets)
    for index, (step, score) in enumerate(zip(embeddings, scores, strict=True)):
        masks = torch.einsum("bnc,bchw->bnhw", step, pixels)
        distance = phrase_distance(queries[index], tokens[index], valid) if index else torch.zeros_like(score)
        with torch.no_grad():  # the phrase cost is one more number per query
            shifted = inverse_softplus(F.softplus(-score) + distance / 2)
        pairs = match_layer(shifted, masks, targets, score=2.0, mask=5.0, num_points=num_points)
        bce, dice = mask_losses_of_layer(masks, targets, pairs, normaliser, num_points)
        images = torch.cat([torch.full_like(rows, image) for image, (rows, _) in enumerate(pairs)])
        rows = torch.cat([rows for rows, _ in pairs])
        relevant = torch.zeros_like(score)
        relevant[images, rows] = 1.0
        terms = F.binary_cross_entropy_with_logits(score, relevant, reduction="none") * (1 + relevant)
        total = total + 5.0 * (bce + dice) + (terms.sum() + distance[images, rows].sum()) / normaliser
    return total


def inverse_softplus(cost: Tensor) -> Tensor:
    """The logit whose score cost is ``cost``, so that a peer's matcher sees score and phrase cost in one number."""
    return -(cost + torch.log(-torch.expm1(-cost)))


def phrase_distance(queries: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    return align_phrases(queries, tokens, valid, backend="eager")[0]


def whole_picture(merged: Tensor, no_target: Tensor, targets: list[Tensor]) -> Tensor:
    """The merged mask's and the flag's losses."""
    truth = torch.stack([masks.any(0) for masks in targets]).to(merged).flatten(1)
    size = targets[0].shape[-2:]
    values = F.interpolate(merged[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    bce = F.binary_cross_entropy_with_logits(values, truth)
    probs = values.sigmoid()
    dice = (1 - (2 * (probs * truth).sum(-1) + 1) / (probs.sum(-1) + truth.sum(-1) + 1)).mean()
    none = torch.tensor([float(len(masks) == 0) for masks in targets]).to(no_target)
    return 5.0 * (bce + dice) + 0.1 * F.binary_cross_entropy_with_logits(no_target, none)


def transformers_form() -> Callable[..., Tensor]:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=1, class_weight=2.0, mask_weight=5.0, dice_weight=5.0, train_num_points=12544)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    loss = Mask2FormerLoss(config, weights)

    def call(embeddings: Tensor, pixels: Tensor, scores: Tensor, targets: list[Tensor], **rest: Tensor) -> Tensor:
        loss.to(pixels.device)
        embeddings, pixels, scores = (matcher.widened(value) for value in (embeddings, pixels, scores))
        masks = [torch.einsum("bnc,bchw->bnhw", step, pixels) for step in embeddings]
        classes = [torch.stack([score, torch.zeros_like(score)], -1) for score in scores]
        labels = [torch.zeros(len(part), dtype=torch.int64, device=pixels.device) for part in targets]
        earlier = [
            {"masks_queries_logits": mask, "class_queries_logits": kind}
            for mask, kind in zip(masks[:-1], classes[:-1], strict=True)
        ]
        truth = [part.to(pixels.dtype) for part in targets]
        found = loss(masks[-1], classes[-1], truth, labels, earlier)
        return torch.stack([value * weights[name.rstrip("0123456789").rstrip("_")] for name, value in found.items()]).sum()

    return call


def reference(**inputs: Any) -> Tensor:
    return by_layers(**inputs, num_points=None)


TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}  # a matching of nearly equal costs may differ after rounding
BOTH: dict[str, Any] = {"case": "32 images", "direction": "forward+backward", "device": "cuda", "dtype": "bfloat16"}
TARGETS = [
    Target("gresbox, padded targets", "Mask2Former's way", at_least=10.0, syncs_at_most=0, **BOTH),
    Target("gresbox, padded targets", None, microseconds_at_most=3000.0, clock="graph", **BOTH),
]
