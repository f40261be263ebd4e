"""Cost of matching every predicted mask with every target mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape
from gresbox.ops._pixel_chunks import chunks_of
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["pairwise_mask_cost", "query_mask_cost"]

_Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def pairwise_mask_cost(masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Binary cross-entropy and dice distance of every pair of a predicted and a target mask.

    .. math::
        \mathrm{bce}_{nm} = \frac1P \Bigl(\sum_x \mathrm{softplus}(s_{nx}) - \sum_x s_{nx} y_{mx}\Bigr), \qquad
        \mathrm{dice}_{nm} = 1 - \frac{2 \sum_x \sigma(s_{nx}) y_{mx} + 1}{\sum_x \sigma(s_{nx}) + \sum_x y_{mx} + 1}

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527; the mask terms of
    Nguyen et al., arXiv:2411.15087, Eq. (6).
    Differs from the paper: nothing. Two matrix products and one softplus; no ``N x M x P`` tensor.

    Args:
        masks: Mask logits.
        targets: The truth; bool, or fractions of pixels.

    Shape:
        - ``masks``: ``(N, P)``; ``targets``: ``(M, P)`` in [0, 1]; returns two ``(N, M)``. Without pixels both are 0.

    Raises:
        TypeError: If ``masks`` is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> bce, dice = pairwise_mask_cost(torch.tensor([[50.0, -50.0]]), torch.tensor([[True, False], [False, True]]))
        >>> bce, dice
        (tensor([[ 0., 50.]]), tensor([[0.0000, 0.6667]]))
    """
    sizes = check_shape("pairwise_mask_cost", masks=(masks, "N P"), targets=(targets, "M P"))
    dtype = accumulation_dtype("pairwise_mask_cost", masks=masks)
    with no_autocast(masks):
        truth = targets.to(dtype)
        bce, dice = _costs(_sums(masks.to(dtype), truth), truth.sum(-1), sizes["P"])
    return bce.to(masks.dtype), dice.to(masks.dtype)


def query_mask_cost(queries: Tensor, pixels: Tensor, targets: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`pairwise_mask_cost` of masks that are still factored, for a batch: ``queries @ pixels`` is never stored as a whole.

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (4) and (6).
    Differs from the paper: nothing. The pixels are taken chunk by chunk, forward and backward (the registered op
    ``gresbox::query_mask_cost``); all decoder steps can be priced in one pass by stacking their queries. The targets get no
    gradient.

    Args:
        queries: One mask embedding per query.
        pixels: Pixel features.
        targets: The truth at the pixels' size; bool, or fractions of pixels. Padded targets get a cost like any other.
        chunk: Pixels per chunk; None: by size, at most about a quarter of the image.

    Shape:
        - ``queries``: ``(B, N, C)``; ``pixels``: ``(B, C, H, W)``; ``targets``: ``(B, M, H, W)`` in [0, 1].
        - returns two ``(B, N, M)``; without pixels both are 0.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit or ``chunk`` is out of range.

    Example:
        >>> import torch
        >>> queries, pixels = torch.tensor([[[50.0]]]), torch.tensor([[[[1.0, -1.0]]]])
        >>> query_mask_cost(queries, pixels, torch.tensor([[[[True, False]], [[False, True]]]]))[0]
        tensor([[[ 0., 50.]]])
    """
    who = "query_mask_cost"
    check_shape(who, queries=(queries, "B N C"), pixels=(pixels, "B C H W"), targets=(targets, "B M H W"))
    accumulation_dtype(who, queries=queries, pixels=pixels)
    if chunk is not None:
        check_range(who, "chunk", chunk, low=1)
    with no_autocast(queries):
        area = pixels.shape[2] * pixels.shape[3]
        sums = _chunked_sums(queries, pixels, targets.detach(), chunk or 0)
        covered = targets.detach().flatten(2).sum(-1, dtype=sums[0].dtype)
        bce, dice = _costs(sums, covered, area)
    return bce.to(queries.dtype), dice.to(queries.dtype)


def _sums(masks: Tensor, targets: Tensor) -> _Sums:
    """Sums over pixels: of softplus(s) and sigmoid(s), ``(..., N)`` each, and of s y and sigmoid(s) y, ``(..., N, M)`` each."""
    probs = masks.sigmoid()
    across = targets.mT
    return -F.logsigmoid(-masks).sum(-1), probs.sum(-1), masks @ across, probs @ across


def _costs(sums: _Sums, covered: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The two costs from the sums of :func:`_sums` and the targets' areas ``(..., M)``."""
    softplus, probs, agree, overlap = sums
    bce = (softplus[..., None] - agree) / max(pixels, 1)
    dice = 1 - (2 * overlap + 1) / (probs[..., None] + covered[..., None, :] + 1)
    return bce, dice


@torch.library.custom_op(
    "gresbox::query_mask_cost",
    mutates_args=(),
    schema="(Tensor queries, Tensor pixels, Tensor targets, int chunk) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _chunked_sums(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> _Sums:
    """:func:`_sums` of ``queries @ pixels``, chunk by chunk."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, pixels.dtype), torch.float32)
    query, features, truth = queries.to(dtype), pixels.flatten(2), targets.flatten(2)
    batch, count, most = query.shape[0], query.shape[1], truth.shape[1]
    totals = [query.new_zeros((batch, count)) for _ in range(2)] + [query.new_zeros((batch, count, most)) for _ in range(2)]
    for part in chunks_of(features.shape[2], batch * count, chunk, queries.device):
        sums = _sums(query @ features[:, :, part].to(dtype), truth[:, :, part].to(dtype))
        for total, more in zip(totals, sums, strict=True):
            total += more
    return totals[0], totals[1], totals[2], totals[3]


@_chunked_sums.register_fake
def _chunked_sums_fake(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> _Sums:
    dtype = torch.promote_types(torch.promote_types(queries.dtype, pixels.dtype), torch.float32)
    each = queries.new_empty(queries.shape[:2], dtype=dtype)
    pair = queries.new_empty((*queries.shape[:2], targets.shape[1]), dtype=dtype)
    return each, torch.empty_like(each), pair, torch.empty_like(pair)


@torch.library.custom_op(
    "gresbox::query_mask_cost_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor queries, Tensor pixels, Tensor targets, int chunk) -> (Tensor, Tensor)",
)
def _chunked_backward(grads: list[Tensor], queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Gradients of queries and pixels from those of the four sums; each chunk's masks are built again."""
    grad_softplus, grad_probs, grad_agree, grad_overlap = grads
    dtype = grad_softplus.dtype
    query, features, truth = queries.to(dtype), pixels.flatten(2), targets.flatten(2)
    grad_query, grad_pixels = torch.zeros_like(query), pixels.new_empty(features.shape)
    with no_autocast(queries):  # a backward pass may be called under autocast
        for part in chunks_of(features.shape[2], query.shape[0] * query.shape[1], chunk, queries.device):
            feature, target = features[:, :, part].to(dtype), truth[:, :, part].to(dtype)
            probs = (query @ feature).sigmoid()
            to_probs = grad_probs[..., None] + grad_overlap @ target
            grad_masks = probs * (grad_softplus[..., None] + to_probs * (1 - probs)) + grad_agree @ target
            grad_query += grad_masks @ feature.mT
            grad_pixels[:, :, part] = query.mT @ grad_masks
    return grad_query.to(queries.dtype), grad_pixels.view(pixels.shape)


@_chunked_backward.register_fake
def _chunked_backward_fake(
    grads: list[Tensor], queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), pixels.new_empty(pixels.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    queries, pixels, targets, ctx.chunk = inputs
    ctx.save_for_backward(queries, pixels, targets)


def _differentiate(ctx, *grads):  # type: ignore[no-untyped-def]
    grad_query, grad_pixels = _chunked_backward(list(grads), *ctx.saved_tensors, ctx.chunk)
    return grad_query, grad_pixels, None, None


_chunked_sums.register_autograd(_differentiate, setup_context=_setup_context)
