"""The registered op behind ``aggregate_queries``: pieces of the batch, forward and backward, so that all masks never exist at once.

With PReLU the gradient needs one thing of the masks: on which side of zero they are. The forward pass keeps that, and the masks are
not built a second time. With ``M`` the logits' gradient ``g`` where a mask is positive and 0 elsewhere,

    sum_x g PReLU'(s_i) V = A_i + a_i (u - A_i),    A = M V^t,    u = g V^t,    sum_x g min(s_i, 0) = Q_i . (u - A_i),

and PReLU is its slope times its argument, so that the gradients of queries, scores and slopes follow from ``A`` and ``u``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops._pixel_chunks import pieces_of, write_product
from gresbox.ops._register import Forms, define_op

__all__ = ["FORMS", "KEEP_BITS", "KEEP_BYTES", "KEEP_NOTHING", "SELECT_NOTHING", "SMALLEST", "aggregate_factored", "kernel_refusal"]

FORMS = ("prelu", "noisy_or", "select")
SELECT_NOTHING = -10.0  # merged logit of "select" where no query is selected
SMALLEST = 1e-30  # scores below count as this in "noisy_or": its logarithm and the reciprocal are finite in float32
MOST_IMAGES = 65535  # of the kernel: programs along the later axes of a CUDA grid
KEEP_NOTHING, KEEP_BYTES, KEEP_BITS = 0, 1, 32  # how the sides of zero are kept: queries' pixels per number

_Gradients = tuple[Tensor, Tensor, Tensor]
_Found = tuple[Tensor | None, ...]


def merge_pieces(
    queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor | None, form: str, chunk: int, keep: int
) -> tuple[Tensor, Tensor]:
    """Merged logits ``(B, H, W)`` in the widest of float32 and the inputs' dtypes, and where masks are positive if that is kept."""
    query, features, score, factor = _prepare(queries, pixels, scores, slope)
    merged, sides = _empty(queries, pixels, scores, slope, form, chunk, keep)
    flat, positive = merged.flatten(1)[:, None], sides
    if keep == KEEP_BITS and sides.ndim == 3:
        positive = sides.new_empty((*query.shape[:2], features.shape[2]), dtype=torch.bool)
    linear, rectified = _weights(score, factor)
    masks = None
    for piece in pieces_of(features.shape[0], query.shape[1], features.shape[1], features.shape[2], chunk, queries.device):
        feature, out = piece.of(features).to(query.dtype), piece.of(flat)
        masks = _product(piece.each(query), feature, masks)
        if form != "prelu":
            out.copy_(_merge(masks, piece.each(score), form)[:, None])
            continue
        torch.bmm(piece.each(linear), masks, out=out)
        if rectified is None:
            continue
        if keep and sides.ndim == 3:
            torch.gt(masks, 0, out=piece.of(positive))
        out.baddbmm_(piece.each(rectified), masks.relu_())
    if positive is not sides:
        sides.copy_(_packed(positive))
    return merged, sides


def unmerge_pieces(
    grad: Tensor,
    queries: Tensor,
    pixels: Tensor,
    scores: Tensor,
    slope: Tensor | None,
    form: str,
    chunk: int,
    keep: int,
    sides: Tensor,
    needs: Sequence[bool],
) -> _Found:
    """Gradients of queries, pixels, scores and slope."""
    query, features, score, factor = _prepare(queries, pixels, scores, slope)
    grad_pixels = pixels.new_empty(features.shape) if needs[1] else None
    if form == "prelu":
        if keep == KEEP_BITS and sides.ndim == 3:
            sides = _unpacked(sides, features.shape[2])
        found = _unmerge_prelu(grad.flatten(1), sides, (query, features, score, factor), chunk, grad_pixels)
    else:
        found = _unmerge_masks(grad.flatten(1), (query, features, score), form, chunk, grad_pixels)
    grad_query, grad_score, grad_factor = found
    grad_slope = None
    if slope is not None:
        grad_slope = (grad_factor.sum() if slope.ndim == 0 else grad_factor.sum(0)).to(slope.dtype)
    if grad_pixels is not None:
        grad_pixels = grad_pixels.view(pixels.shape)
    return grad_query.to(queries.dtype), grad_pixels, grad_score.to(scores.dtype), grad_slope


def _empty(
    queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor | None, form: str, chunk: int, keep: int
) -> tuple[Tensor, Tensor]:
    """The op's outputs, not filled."""
    area = pixels.shape[2] * pixels.shape[3]
    size = (*queries.shape[:2], area if keep == KEEP_BYTES else -(-area // 32))
    known = keep != KEEP_NOTHING and slope is not None and form == "prelu"
    sides = pixels.new_empty(size if known else (0,), dtype=torch.int32 if keep == KEEP_BITS else torch.bool)
    return pixels.new_empty((pixels.shape[0], *pixels.shape[2:]), dtype=_wide(queries, pixels, scores)), sides


def _packed(positive: Tensor) -> Tensor:
    """``(B, N, P)`` bool to ``(B, N, ceil(P / 32))`` int32; pixel 0 is the lowest bit."""
    padded = F.pad(positive, (0, -positive.shape[-1] % 32)).unflatten(-1, (-1, 32)).to(torch.int32)
    return (padded << torch.arange(32, device=positive.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _unpacked(sides: Tensor, area: int) -> Tensor:
    bits = sides[..., None] >> torch.arange(32, device=sides.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(-2)[..., :area]


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


def _weights(score: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """PReLU is linear plus a multiple of max(s, 0): both weights, ``(B, 1, N)``."""
    if factor is None:
        return score[:, None], None
    slope = factor[:, 0]
    return (score * slope)[:, None], (score * (1 - slope))[:, None]


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """Batched; over the last piece's masks where they have the same size: fresh memory costs as much as a pass over it."""
    if out is None or out.shape != (*left.shape[:2], right.shape[2]):
        return torch.bmm(left, right)
    return torch.bmm(left, right, out=out)


def _unmerge_prelu(
    grad: Tensor, sides: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], chunk: int, grad_pixels: Tensor | None
) -> _Gradients:
    """Gradients of queries, scores and slopes per image and query; that of the pixels is written."""
    query, features, score, factor = inputs
    count = 0 if factor is None else query.shape[1]
    linear, rectified = _weights(score, factor)
    rows = linear @ query if rectified is None else torch.cat([query * rectified.mT, linear @ query], 1)
    back = rows.mT  # (B, C, N + 1)
    sums = torch.zeros_like(rows)
    for piece in pieces_of(features.shape[0], count + 1, features.shape[1], features.shape[2], chunk, query.device):
        feature, column = piece.of(features).to(query.dtype), piece.of(grad[:, None])
        masked = grad.new_empty((column.shape[0], count + 1, column.shape[2]))
        if count:
            positive = piece.of(sides) if sides.ndim == 3 else torch.bmm(piece.each(query), feature) > 0
            torch.mul(positive, column, out=masked[:, :count])
        masked[:, count:] = column
        sums[piece.images] += piece.total(torch.bmm(masked, feature.mT))
        if grad_pixels is not None:
            write_product(piece.each(back), masked, piece.of(grad_pixels))
    everywhere = sums[:, count:]
    if factor is None:
        change, below = everywhere, torch.zeros_like(everywhere)
    else:
        below = everywhere - sums[:, :count]
        change = sums[:, :count] + factor * below
    return score[..., None] * change, (query * change).sum(-1), score * (query * below).sum(-1)


def _unmerge_masks(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], form: str, chunk: int, grad_pixels: Tensor | None
) -> _Gradients:
    """As :func:`_unmerge_prelu` for the forms whose gradient needs the masks; they are built again."""
    query, features, score = inputs
    grad_query, grad_score = query.new_zeros(query.shape), score.new_zeros(score.shape)
    for piece in pieces_of(features.shape[0], query.shape[1], features.shape[1], features.shape[2], chunk, query.device):
        feature = piece.of(features).to(query.dtype)
        masks = torch.bmm(piece.each(query), feature)
        grad_masks, part_score = _unmerge(masks, piece.each(score), piece.of(grad[:, None])[:, 0], form)
        grad_query[piece.images] += piece.total(torch.bmm(grad_masks, feature.mT))
        grad_score[piece.images] += piece.total(part_score)
        if grad_pixels is not None:
            write_product(piece.each(query.mT), grad_masks, piece.of(grad_pixels))
    return grad_query, grad_score, torch.zeros_like(score)


def _merge(masks: Tensor, scores: Tensor, form: str) -> Tensor:
    """``(B, N, P)`` logits, ``(B, N)`` scores to ``(B, P)``. It may write over ``masks``."""
    if masks.shape[1] == 0:
        return masks.sum(1) + (math.log(SMALLEST) if form == "noisy_or" else SELECT_NOTHING)
    if form == "noisy_or":
        return _noisy_or_terms(masks, scores)[2]
    chosen = scores > 0.5
    largest = masks.masked_fill_(~chosen[..., None], -torch.inf).amax(1)
    return torch.where(chosen.any(1)[:, None], largest, SELECT_NOTHING)


def _unmerge(masks: Tensor, scores: Tensor, grad: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``(grad * merged).sum()`` with respect to masks ``(B, N, P)`` and scores ``(B, N)``."""
    if masks.shape[1] == 0:
        return masks, torch.zeros_like(scores)
    if form == "noisy_or":
        return _unmerge_noisy_or(masks, scores, grad)
    chosen = scores > 0.5
    largest = masks.masked_fill(~chosen[..., None], -torch.inf).max(1, keepdim=True).indices
    passed = grad * chosen.any(1)[:, None]
    return masks.zero_().scatter_(1, largest, passed[:, None]), torch.zeros_like(scores)


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


def kernel_refusal(queries: Tensor, pixels: Tensor, slope: Tensor | None, form: str) -> str | None:
    """Why the kernel cannot take these inputs."""
    if form != "prelu" or slope is None:
        return "its kernel merges with form='prelu' and a slope"
    if pixels.shape[1] > 4096:
        return f"its kernel takes up to 4096 channels, here are {pixels.shape[1]}"
    if pixels.shape[0] > MOST_IMAGES:
        return f"its kernel takes up to {MOST_IMAGES} images, here are {pixels.shape[0]}"
    reach = sum((size - 1) * stride for size, stride in zip(pixels.shape[1:], pixels.stride()[1:], strict=True))
    if reach >= 2**31:
        return "one image's pixel features reach over 2**31 numbers"
    return None


def _merge_kernel(
    queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor, form: str, chunk: int, keep: int
) -> tuple[Tensor, Tensor]:
    from gresbox.kernels.aggregation import merge

    if not pixels.numel():
        return merge_pieces(queries, pixels, scores, slope, form, chunk, keep)
    merged, sides = merge(queries, pixels.flatten(2), scores, slope, keep == KEEP_BITS)
    return merged.view(pixels.shape[0], *pixels.shape[2:]), sides


def _unmerge_kernel(
    grad: Tensor,
    queries: Tensor,
    pixels: Tensor,
    scores: Tensor,
    slope: Tensor,
    form: str,
    chunk: int,
    keep: int,
    sides: Tensor,
    needs: Sequence[bool],
) -> _Found:
    from gresbox.kernels.aggregation import merge, unmerge

    if not pixels.numel():
        return unmerge_pieces(grad, queries, pixels, scores, slope, form, chunk, keep, sides, needs)
    features = pixels.flatten(2)
    if keep != KEEP_BITS:
        sides = merge(queries, features, scores, slope, True)[1] if keep == KEEP_NOTHING else _packed(sides)
    to_rest = needs[0] or needs[2] or needs[3]
    flat = grad.contiguous().flatten(1)
    found = unmerge(flat, sides, queries, features, scores, slope, to_pixels=needs[1], to_rest=to_rest)
    grad_query, grad_pixels, grad_score, grad_slope = found
    if grad_slope is not None:
        grad_slope = (grad_slope.sum() if slope.ndim == 0 else grad_slope.sum(0)).to(slope.dtype)
    return grad_query, None if grad_pixels is None else grad_pixels.view(pixels.shape), grad_score, grad_slope


aggregate_factored = define_op(
    "aggregate_queries(Tensor queries, Tensor pixels, Tensor scores, Tensor? slope, str form, int chunk, int keep)"
    " -> (Tensor, Tensor)",
    fake=_empty,
    forward=Forms(
        merge_pieces,
        _merge_kernel,
        lambda q, v, p, a, form, chunk, keep: "it keeps bits" if keep == KEEP_BYTES else kernel_refusal(q, v, a, form),
    ),
    backward=Forms(unmerge_pieces, _unmerge_kernel, lambda grad, q, v, p, a, form, *rest: kernel_refusal(q, v, a, form)),
    differentiable=("queries", "pixels", "scores", "slope"),
    auxiliary=(1,),
)
