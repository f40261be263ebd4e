"""Cost of matching every predicted mask with every target mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_count, check_float_dtype, check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._pixel_chunks import pieces_of, write_product
from gresbox.ops._precision import accumulation_dtype, no_autocast
from gresbox.ops._register import Forms, define_op

__all__ = ["pairwise_mask_cost", "query_mask_cost"]

MOST_TARGETS = 64  # of the kernel

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


def query_mask_cost(
    queries: Tensor,
    pixels: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`pairwise_mask_cost` of masks that are still factored, for a batch: ``queries @ pixels`` is never stored as a whole.

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (4) and (6).
    Differs from the paper: nothing. All decoder steps can be priced in one pass over the pixels by stacking their queries. A kernel
    does it in two launches on CUDA; elsewhere the pixels are taken chunk by chunk. Both are the registered op
    ``gresbox::query_mask_cost``, whose backward pass goes chunk by chunk everywhere: matching needs no gradient. The targets get
    none. There is no double backward; use ``"eager"`` for that.

    Args:
        queries: One mask embedding per query.
        pixels: Pixel features.
        targets: The truth at the pixels' size; bool, or fractions of pixels. Padded targets get a cost like any other.
        chunk: Pixels per chunk; None: pieces whose masks hold 2 MB at most, on a GPU 64 MB, in float32. Kernels do not read it.
        dtype: Dtype of the result; None: that of ``queries``. Costs that are compared should not be rounded to 16 bits.
        backend: ``"eager"`` builds all masks, ``"auto"`` runs the kernel on CUDA and chunks elsewhere, ``"triton"`` is the kernel.

    Shape:
        - ``queries``: ``(B, N, C)``; ``pixels``: ``(B, C, H, W)``; ``targets``: ``(B, M, H, W)`` in [0, 1].
        - returns two ``(B, N, M)``; without pixels both are 0.

    Raises:
        TypeError: If an input or ``dtype`` is not floating-point, or ``chunk`` no whole number.
        ValueError: If a shape does not fit or ``chunk`` is out of range.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> queries, pixels = torch.tensor([[[50.0]]]), torch.tensor([[[[1.0, -1.0]]]])
        >>> query_mask_cost(queries, pixels, torch.tensor([[[[True, False]], [[False, True]]]]))[0]
        tensor([[[ 0., 50.]]])
    """
    who = "query_mask_cost"
    check_shape(who, queries=(queries, "B N C"), pixels=(pixels, "B C H W"), targets=(targets, "B M H W"))
    wide = accumulation_dtype(who, queries=queries, pixels=pixels)
    if chunk is not None:
        check_count(who, "chunk", chunk)
    check_float_dtype(who, "dtype", dtype)
    refusal = _refusal(queries, pixels, targets, 0) if backend == "triton" else None  # for "auto" the op itself asks, untraced
    use_triton(who, backend, queries, pixels, targets, kernel=refusal or True)
    truth = targets.detach()
    if backend == "eager":
        with no_autocast(queries):
            sums = _sums(queries.to(wide) @ pixels.to(wide).flatten(2), truth.flatten(2).to(wide))
            bce, dice = _costs(sums, truth.flatten(2).sum(-1, dtype=wide), pixels.shape[2] * pixels.shape[3])
    else:
        bce, dice, _, _ = _priced(queries, pixels, truth, chunk or 0)
    return bce.to(dtype or queries.dtype), dice.to(dtype or queries.dtype)


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


def _consuming_sums(masks: Tensor, targets: Tensor) -> _Sums:
    """:func:`_sums`, with fewer passes over memory; it writes over ``masks``."""
    across = targets.mT
    softplus, agree = F.softplus(masks, threshold=50).sum(-1), masks @ across  # beyond 50 it is the logit itself, in float64 too
    probs = masks.sigmoid_()
    return softplus, probs.sum(-1), agree, probs @ across


def price_chunks(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> _Sums:
    """The two costs, and what their gradient reads of :func:`_sums`: probabilities and those inside each target."""
    dtype = _wide(queries, pixels)
    query, features, truth = queries.to(dtype), pixels.flatten(2), targets.flatten(2)
    batch, count, most = query.shape[0], query.shape[1], truth.shape[1]
    totals = [query.new_zeros((batch, count)) for _ in range(2)] + [query.new_zeros((batch, count, most)) for _ in range(2)]
    for piece in pieces_of(batch, count, features.shape[1], features.shape[2], chunk, queries.device):
        masks = torch.bmm(piece.each(query), piece.of(features).to(dtype))
        for total, more in zip(totals, _consuming_sums(masks, piece.of(truth).to(dtype)), strict=True):
            total[piece.images] += piece.total(more)
    softplus, probs, agree, overlap = totals
    bce, dice = _costs((softplus, probs, agree, overlap), truth.sum(-1, dtype=dtype), features.shape[2])
    return bce, dice, probs, overlap


def _fake(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> _Sums:
    each = queries.new_empty(queries.shape[:2], dtype=_wide(queries, pixels))
    bce, dice, overlap = (each.new_empty((*queries.shape[:2], targets.shape[1])) for _ in range(3))
    return bce, dice, each, overlap


def unprice_chunks(
    grad_bce: Tensor,
    grad_dice: Tensor,
    queries: Tensor,
    pixels: Tensor,
    targets: Tensor,
    chunk: int,
    probs: Tensor,
    overlap: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of queries and pixels; each chunk's masks are built again."""
    dtype = probs.dtype
    query, features, truth = queries.to(dtype), pixels.flatten(2), targets.flatten(2)
    grad_agree = grad_bce / -max(features.shape[2], 1)  # (B, N, M)
    grad_softplus = -grad_agree.sum(-1)
    union = probs[..., None] + truth.sum(-1, dtype=dtype)[..., None, :] + 1
    grad_overlap = -2 * grad_dice / union
    grad_probs = (grad_dice * (2 * overlap + 1) / union.square()).sum(-1)
    grad_query = query.new_zeros(query.shape) if needs[0] else None
    grad_pixels = pixels.new_empty(features.shape) if needs[1] else None
    for piece in pieces_of(query.shape[0], query.shape[1], features.shape[1], features.shape[2], chunk, queries.device):
        feature, target = piece.of(features).to(dtype), piece.of(truth).to(dtype)
        inside = torch.bmm(piece.each(query), feature).sigmoid_()
        to_probs = piece.each(grad_probs)[..., None] + torch.bmm(piece.each(grad_overlap), target)
        grad_masks = inside * (piece.each(grad_softplus)[..., None] + to_probs * (1 - inside))
        grad_masks += torch.bmm(piece.each(grad_agree), target)
        if grad_query is not None:
            grad_query[piece.images] += piece.total(torch.bmm(grad_masks, feature.mT))
        if grad_pixels is not None:
            write_product(piece.each(query.mT), grad_masks, piece.of(grad_pixels))
    return (
        None if grad_query is None else grad_query.to(queries.dtype),
        None if grad_pixels is None else grad_pixels.view(pixels.shape),
    )


def _wide(queries: Tensor, pixels: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(queries.dtype, pixels.dtype), torch.float32)


def _kernel(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> _Sums:
    from gresbox.kernels.mask_costs import price

    return price(queries, pixels, targets)


def _refusal(queries: Tensor, pixels: Tensor, targets: Tensor, chunk: int) -> str | None:
    """Why the kernel cannot take these inputs."""
    if 0 in (*queries.shape, *targets.shape):
        return "some axis has no element"
    if targets.shape[1] > MOST_TARGETS:
        return f"there are more than {MOST_TARGETS} targets"
    for tensor in (pixels, targets):  # addresses inside one image are 32 bits wide
        if sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
            return "one image reaches over more than 2**31 values"
    return None


_priced = define_op(
    "query_mask_cost(Tensor queries, Tensor pixels, Tensor targets, int chunk) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    forward=Forms(price_chunks, _kernel, _refusal),
    backward=Forms(unprice_chunks),
    differentiable=("queries", "pixels"),
    auxiliary=(2, 3),
)
