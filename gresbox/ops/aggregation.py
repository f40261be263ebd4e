"""One mask from many: the queries' masks merged by their relevance."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_choice, check_count, check_shape
from gresbox.ops._aggregation_chunks import (
    FORMS,
    KEEP_BITS,
    KEEP_BYTES,
    KEEP_NOTHING,
    SELECT_NOTHING,
    SMALLEST,
    aggregate_factored,
    kernel_refusal,
)
from gresbox.ops._backend import use_triton
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["aggregate_masks", "aggregate_queries"]


def aggregate_masks(
    masks: Tensor, scores: Tensor, slope: Tensor | float | None, *, bias: Tensor | None = None, form: str = "prelu"
) -> Tensor:
    r"""Merge mask logits by the relevance of their queries.

    .. math::
        \text{prelu: } z = \sum_i p_i\,\mathrm{PReLU}(s_i; a), \qquad
        \text{noisy\_or: } z = \mathrm{logit}\Bigl(1 - \prod_i (1 - p_i\,\sigma(s_i))\Bigr), \qquad
        \text{select: } z = \max_{p_i > 0.5} s_i

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.5, Eq. (8) before
    the sigmoid; ``"select"`` is the baseline of Table 3b.
    Differs from the paper: ``bias`` and ``"noisy_or"`` (the probability that at least one relevant instance covers the pixel) are
    additions; the threshold of ``"select"`` is not printed.

    Args:
        masks: Mask logits.
        scores: Relevance of each query. ``"noisy_or"`` counts scores below 1e-30 as 1e-30, so that the result is finite.
        slope: Factor on negative logits in ``"prelu"``, one for all or one per query; None: no PReLU. Other forms do not read it.
        bias: Added to the result.
        form: ``"prelu"`` (the paper's), ``"noisy_or"`` or ``"select"``. In ``"select"`` the gradient goes to the largest selected
            logit of each pixel; where no query is selected the result is the constant -10.

    Shape:
        - ``masks``: ``(B, N, H, W)``; ``scores``: ``(B, N)`` in [0, 1]; ``slope``: ``()`` or ``(N,)``; ``bias``: ``()``.
        - returns ``(B, H, W)`` logits; the mask is where they are positive.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit or ``form`` is unknown.

    Example:
        >>> import torch
        >>> masks = torch.tensor([4.0, -4.0]).view(1, 2, 1, 1)
        >>> aggregate_masks(masks, torch.tensor([[1.0, 0.5]]), torch.tensor(0.25))
        tensor([[[3.5000]]])
    """
    who = "aggregate_masks"
    sizes = check_shape(who, masks=(masks, "B N H W"), scores=(scores, "B N"))
    dtype = accumulation_dtype(who, masks=masks, scores=scores)
    check_choice(who, "form", form, FORMS)
    factor = _check_slope(who, slope, sizes["N"], masks.device) if form == "prelu" else None
    with no_autocast(masks):
        logits, relevance = masks.to(dtype).flatten(2), scores.to(dtype)
        if form == "prelu":
            merged = _weighted_sum(logits, relevance, factor)
        elif form == "noisy_or":
            merged = _noisy_or(logits, relevance)
        else:
            merged = _select(logits, relevance)
        merged = _add_bias(who, merged, bias)
        return merged.unflatten(-1, masks.shape[-2:]).to(masks.dtype)


def aggregate_queries(
    queries: Tensor,
    pixels: Tensor,
    scores: Tensor,
    slope: Tensor | float | None,
    *,
    bias: Tensor | None = None,
    form: str = "prelu",
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Merge masks that are still factored: :func:`aggregate_masks` of ``queries @ pixels``, without ever storing all masks.

    .. math:: s_i = V\,Q_i, \qquad z = \sum_i p_i\,\mathrm{PReLU}(s_i; a)

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (4) and (8).
    Differs from the paper: as :func:`aggregate_masks`. The pixels are taken chunk by chunk, forward and backward. For the gradient
    of ``"prelu"`` it is kept on which side of zero each mask is, and no mask is built again; other forms keep only the inputs and
    build each chunk's masks a second time. There is no double backward; use ``"eager"`` for that.

    Args:
        queries: One mask embedding per query.
        pixels: Pixel features.
        scores: Relevance of each query.
        slope: As in :func:`aggregate_masks`.
        bias: Added to the result.
        form: As in :func:`aggregate_masks`.
        chunk: Pixels per chunk; None: pieces whose masks hold 2 MB at most, on a GPU 64 MB, in float32.
        backend: ``"eager"`` builds all masks, ``"auto"`` goes chunk by chunk (the registered op ``gresbox::aggregate_queries``).

    Shape:
        - ``queries``: ``(B, N, C)``; ``pixels``: ``(B, C, H, W)``; ``scores``: ``(B, N)`` in [0, 1]; ``slope``: ``()`` or ``(N,)``;
          ``bias``: ``()``; returns ``(B, H, W)`` logits.

    Raises:
        TypeError: If an input is not floating-point or ``chunk`` no whole number.
        ValueError: If a shape does not fit, or ``form`` or ``chunk`` is out of range.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> queries, pixels = torch.tensor([[[2.0], [-1.0]]]), torch.tensor([2.0, -2.0]).view(1, 1, 1, 2)
        >>> aggregate_queries(queries, pixels, torch.tensor([[1.0, 0.5]]), torch.tensor(0.25))
        tensor([[[3.7500, 0.0000]]])
    """
    who = "aggregate_queries"
    sizes = check_shape(who, queries=(queries, "B N C"), pixels=(pixels, "B C H W"), scores=(scores, "B N"))
    dtype = accumulation_dtype(who, queries=queries, pixels=pixels, scores=scores)
    check_choice(who, "form", form, FORMS)
    if chunk is not None:
        check_count(who, "chunk", chunk)
    factor = _check_slope(who, slope, sizes["N"], queries.device) if form == "prelu" else None
    inputs = [tensor for tensor in (queries, pixels, scores, factor) if tensor is not None]
    kernel = use_triton(who, backend, *inputs, kernel=kernel_refusal(queries, pixels, factor, form) or True)
    with no_autocast(queries):
        if backend == "eager":
            masks = (queries.to(dtype) @ pixels.to(dtype).flatten(2)).unflatten(-1, pixels.shape[-2:])
            return aggregate_masks(masks, scores, factor, bias=bias, form=form).to(queries.dtype)
        keep = KEEP_BITS if kernel else KEEP_BYTES
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            keep = KEEP_NOTHING
        merged, _ = aggregate_factored(queries, pixels, scores, factor, form, chunk or 0, keep)
        return _add_bias(who, merged, bias).to(queries.dtype)


def _check_slope(who: str, slope: Tensor | float | None, count: int, device: torch.device) -> Tensor | None:
    """The slope as a tensor ``()`` or ``(N,)``."""
    if slope is None:
        return None
    if not isinstance(slope, (Tensor, Real, torch.SymFloat)):
        raise TypeError(f"{who}: `slope` must be a tensor, a number or None, got {type(slope).__name__}.")
    factor = slope if isinstance(slope, Tensor) else torch.full((), slope, device=device)
    if factor.ndim > 1 or factor.numel() not in (1, count):
        raise ValueError(f"{who}: `slope` must be () or (N,) with N={count}, got {tuple(factor.shape)}.")
    return factor.reshape(()) if factor.numel() == 1 else factor


def _add_bias(who: str, merged: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return merged
    if not isinstance(bias, Tensor):
        raise TypeError(f"{who}: `bias` must be a tensor or None, got {type(bias).__name__}.")
    if bias.numel() != 1:
        raise ValueError(f"{who}: `bias` must be (), got {tuple(bias.shape)}.")
    return merged + bias.reshape(())


def _weighted_sum(logits: Tensor, scores: Tensor, slope: Tensor | None) -> Tensor:
    """Eq. (8): ``(B, N, P)`` and ``(B, N)`` to ``(B, P)``."""
    if slope is not None and logits.shape[1] > 0:
        logits = F.prelu(logits, slope.to(logits.dtype).reshape(-1))
    return (scores[:, None] @ logits)[:, 0]


def _noisy_or(logits: Tensor, scores: Tensor) -> Tensor:
    """``log(prod_i (1 + exp t_i) - 1)`` with ``t_i`` the logit of ``p_i sigmoid(s_i)``: no term is a difference of near-equals."""
    if logits.shape[1] == 0:
        return logits.sum(1) + math.log(SMALLEST)
    certain = scores >= 1
    log_rest = torch.where(certain, -torch.inf, torch.where(certain, 1, 1 - scores).log())  # log(1 - p)
    log_score = scores.clamp(SMALLEST, 1).log()
    each = log_score[..., None] - torch.logaddexp(-logits, log_rest[..., None])  # (B, N, P)
    total = -F.logsigmoid(-each).sum(1)
    tiny = total < torch.finfo(total.dtype).eps  # there the product is 1 plus the sum
    large = torch.where(tiny, 1, total)
    return torch.where(tiny, each.logsumexp(1), large + (-torch.expm1(-large)).log())


def _select(logits: Tensor, scores: Tensor) -> Tensor:
    """Largest logit of the queries with a score above one half."""
    if logits.shape[1] == 0:
        return logits.sum(1) + SELECT_NOTHING
    chosen = scores > 0.5
    largest = logits.masked_fill(~chosen[..., None], -torch.inf).max(1).values
    return torch.where(chosen.any(1)[:, None], largest, SELECT_NOTHING)
