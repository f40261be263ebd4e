"""The registered op behind ``aggregate_queries``: chunks of pixels, forward and backward, so that all masks never exist at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops._pixel_chunks import chunks_of
from gresbox.ops._register import Forms, define_op

__all__ = ["FORMS", "SELECT_NOTHING", "SMALLEST", "aggregate_factored", "merge_chunks", "unmerge_chunks"]

FORMS = ("prelu", "noisy_or", "select")
SELECT_NOTHING = -10.0  # merged logit of "select" where no query is selected
SMALLEST = 1e-30  # scores below count as this in "noisy_or": its logarithm and the reciprocal are finite in float32

_Gradients = tuple[Tensor, Tensor, Tensor]


def merge_chunks(queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor | None, form: str, chunk: int) -> Tensor:
    """Merged logits ``(B, H, W)`` in the widest of float32 and the inputs' dtypes."""
    query, features, score, factor = _prepare(queries, pixels, scores, slope)
    merged = query.new_empty((features.shape[0], features.shape[2]))
    for part in chunks_of(features.shape[2], score.numel(), chunk, queries.device):
        masks = query @ features[:, :, part].to(query.dtype)  # (B, N, chunk)
        merged[:, part] = _merge(masks, score, factor, form)
    return merged.view(pixels.shape[0], *pixels.shape[2:])


def _fake(queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor | None, form: str, chunk: int) -> Tensor:
    return pixels.new_empty((pixels.shape[0], *pixels.shape[2:]), dtype=_wide(queries, pixels, scores))


def unmerge_chunks(
    grad: Tensor,
    queries: Tensor,
    pixels: Tensor,
    scores: Tensor,
    slope: Tensor | None,
    form: str,
    chunk: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of queries, pixels, scores and slope; each chunk's masks are built again."""
    query, features, score, factor = _prepare(queries, pixels, scores, slope)
    grad = grad.flatten(1)
    grad_query, grad_score = torch.zeros_like(query), torch.zeros_like(score)
    grad_factor = torch.zeros_like(score)  # per query, summed at the end where there is one slope
    grad_pixels = pixels.new_empty(features.shape) if needs[1] else None
    for part in chunks_of(features.shape[2], score.numel(), chunk, queries.device):
        feature = features[:, :, part].to(query.dtype)
        grad_masks, part_score, part_factor = _unmerge(query @ feature, score, factor, grad[:, part], form)
        grad_query += grad_masks @ feature.mT
        grad_score += part_score
        grad_factor += part_factor
        if grad_pixels is not None:
            grad_pixels[:, :, part] = query.mT @ grad_masks
    if grad_pixels is not None:
        grad_pixels = grad_pixels.view(pixels.shape)
    grad_slope = None
    if slope is not None:
        grad_slope = (grad_factor.sum() if slope.ndim == 0 else grad_factor.sum(0)).to(slope.dtype)
    return grad_query.to(queries.dtype), grad_pixels, grad_score.to(scores.dtype), grad_slope


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _prepare(queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything small in the wide dtype; the pixels stay as they are and are widened chunk by chunk."""
    dtype = _wide(queries, pixels, scores)
    factor = None if slope is None else slope.to(dtype).reshape(-1, 1)  # (1, 1) or (N, 1)
    return queries.to(dtype), pixels.flatten(2), scores.to(dtype), factor


def _merge(masks: Tensor, scores: Tensor, slope: Tensor | None, form: str) -> Tensor:
    """``(B, N, P)`` logits, ``(B, N)`` scores to ``(B, P)``. It may write over ``masks``."""
    if form == "prelu":
        if slope is not None:
            masks = torch.where(masks > 0, masks, masks * slope)
        return (scores[:, None] @ masks)[:, 0]
    if masks.shape[1] == 0:
        return masks.sum(1) + (math.log(SMALLEST) if form == "noisy_or" else SELECT_NOTHING)
    if form == "noisy_or":
        return _noisy_or_terms(masks, scores)[2]
    chosen = scores > 0.5
    largest = masks.masked_fill_(~chosen[..., None], -torch.inf).amax(1)
    return torch.where(chosen.any(1)[:, None], largest, SELECT_NOTHING)


def _unmerge(masks: Tensor, scores: Tensor, slope: Tensor | None, grad: Tensor, form: str) -> _Gradients:
    """Gradients of ``(grad * merged).sum()`` with respect to masks ``(B, N, P)``, scores and slopes ``(B, N)``."""
    if form == "prelu":
        return _unmerge_prelu(masks, scores, slope, grad)
    nothing = torch.zeros_like(scores)
    if masks.shape[1] == 0:
        return masks, nothing, nothing
    if form == "noisy_or":
        grad_masks, grad_scores = _unmerge_noisy_or(masks, scores, grad)
        return grad_masks, grad_scores, nothing
    chosen = scores > 0.5
    largest = masks.masked_fill(~chosen[..., None], -torch.inf).max(1, keepdim=True).indices
    passed = grad * chosen.any(1)[:, None]
    return masks.zero_().scatter_(1, largest, passed[:, None]), nothing, nothing


def _unmerge_prelu(masks: Tensor, scores: Tensor, slope: Tensor | None, grad: Tensor) -> _Gradients:
    """Of ``z = sum_i p_i (max(s_i, 0) + a_i min(s_i, 0))``."""
    column = grad[..., None]  # (B, P, 1)
    below = masks.clamp(max=0)
    if slope is None:
        grad_slope = torch.zeros_like(scores)
        grad_scores = (masks @ column)[..., 0]
        return scores[..., None] * grad[:, None], grad_scores, grad_slope
    below_sum = (below @ column)[..., 0]  # (B, N)
    grad_scores = ((masks - below) @ column)[..., 0] + slope[:, 0] * below_sum
    weight = torch.where(masks > 0, 1, slope)  # dPReLU/ds
    return weight * scores[..., None] * grad[:, None], grad_scores, scores * below_sum


def _noisy_or_terms(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``A = log(exp(-s) + 1 - p)``, the logit of ``p sigmoid(s)``, which is ``log p - A``, and the merged logit."""
    rest = torch.logaddexp(-masks, torch.log1p(-scores.clamp(0, 1))[..., None])
    each = scores.clamp(SMALLEST, 1).log()[..., None] - rest
    total = -F.logsigmoid(-each).sum(1)
    tiny = total < torch.finfo(total.dtype).eps
    return rest, each, torch.where(tiny, each.logsumexp(1), total + (-torch.expm1(-total)).log())


def _unmerge_noisy_or(masks: Tensor, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """dz/dt = sigmoid(t) / sigmoid(z); dt/ds = exp(-s - A); dt/dp = 1/p + exp(-A). Products are made of logarithms."""
    rest, each, merged = _noisy_or_terms(masks, scores)
    log_total = F.logsigmoid(merged)[:, None]
    share = (F.logsigmoid(each) - log_total).exp()  # dz/dt
    grad_masks = share * (-masks - rest).exp() * grad[:, None]
    # dz/dp = exp(-A) / sigmoid(z); at p = 1 the term exp(-A) of dt/dp has no bound and is left out.
    to_score = torch.where((scores < 1)[..., None], (-rest - log_total).exp(), share)
    grad_scores = (to_score @ grad[..., None])[..., 0]
    return grad_masks, torch.where(scores >= SMALLEST, grad_scores, 0)


aggregate_factored = define_op(
    "aggregate_queries(Tensor queries, Tensor pixels, Tensor scores, Tensor? slope, str form, int chunk) -> Tensor",
    fake=_fake,
    forward=Forms(merge_chunks),
    backward=Forms(unmerge_chunks),
    differentiable=("queries", "pixels", "scores", "slope"),
)
