"""The two losses of one predicted mask against its target, also of masks that are still factored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_float_dtype, check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._matched_masks import compare_matched, kernel_refusal, targets_with_match
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["mask_bce", "mask_dice", "matched_mask_losses"]

_SMALL, _LARGE, _HUGE = 2**18, 2**20, 2**26  # logits: of a batch that is cheap to build, of one image, and too many to keep


def mask_bce(masks: Tensor, targets: Tensor) -> Tensor:
    r"""Binary cross-entropy of each mask, averaged over its pixels or points.

    .. math:: \frac1P \sum_x \mathrm{softplus}(s_x) - s_x y_x

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.3.
    Differs from the paper: nothing; the sum over masks and its normaliser are the caller's.

    Args:
        masks: Mask logits.
        targets: The truth; bool, or fractions of pixels.

    Shape:
        - ``masks``: ``(K, P)``; ``targets``: ``(K, P)`` in [0, 1]; returns ``(K,)``, 0 without pixels.

    Raises:
        TypeError: If ``masks`` is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> mask_bce(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]))
        tensor([0.6931])
    """
    sizes = check_shape("mask_bce", masks=(masks, "K P"), targets=(targets, "K P"))
    dtype = accumulation_dtype("mask_bce", masks=masks)
    with no_autocast(masks):
        logits = masks.to(dtype)
        # Term by term: of a confident, right mask the two sums would be large and nearly equal. Above 40 softplus(s) is s.
        terms = torch.addcmul(F.softplus(logits, threshold=40), logits, targets.to(dtype), value=-1)
        return (terms.sum(-1) / max(sizes["P"], 1)).to(masks.dtype)


def mask_dice(masks: Tensor, targets: Tensor) -> Tensor:
    r"""Dice distance of each mask, smoothed by 1.

    .. math:: 1 - \frac{2 \sum_x \sigma(s_x) y_x + 1}{\sum_x \sigma(s_x) + \sum_x y_x + 1}

    Paper: Milletari et al., "V-Net", arXiv:1606.04797, with the smoothing of Cheng et al., arXiv:2112.01527.
    Differs from the paper: nothing.

    Args:
        masks: Mask logits.
        targets: The truth; bool, or fractions of pixels.

    Shape:
        - ``masks``: ``(K, P)``; ``targets``: ``(K, P)`` in [0, 1]; returns ``(K,)`` in [0, 1).

    Raises:
        TypeError: If ``masks`` is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> mask_dice(torch.tensor([[50.0, -50.0]]), torch.tensor([[True, False]]))
        tensor([0.])
    """
    check_shape("mask_dice", masks=(masks, "K P"), targets=(targets, "K P"))
    dtype = accumulation_dtype("mask_dice", masks=masks)
    with no_autocast(masks):
        probs, truth = masks.to(dtype).sigmoid(), targets.to(dtype)
        overlap = (probs * truth).sum(-1)
        return (1 - (2 * overlap + 1) / (probs.sum(-1) + truth.sum(-1) + 1)).to(masks.dtype)


def matched_mask_losses(
    queries: Tensor,
    pixels: Tensor,
    targets: Tensor,
    matches: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r""":func:`mask_bce` and :func:`mask_dice` of the masks of matched queries, of all decoder steps, from embeddings and pixels.

    .. math:: s = Q_{\omega(m)} V, \qquad \mathrm{bce} = \frac1P \sum_x \mathrm{softplus}(s_x) - s_x y_x, \qquad
        \mathrm{dice} = 1 - \frac{2 \sum_x \sigma(s_x) y_x + 1}{\sum_x \sigma(s_x) + \sum_x y_x + 1}

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (4) and Sec. 3.4
    (:math:`L_{mask}`); the losses of Cheng et al., arXiv:2112.01527, Sec. 3.3, on all pixels.
    Differs from the paper: nothing. On CUDA one pass over the pixels serves all steps and no mask is stored; on the CPU masks of
    targets without a match are not built. Both are the registered op ``gresbox::matched_mask_losses``; small masks, and what is
    compiled for the CPU, take the definition. The targets get no gradient, and there is no double backward but of the definition.

    Args:
        queries: Mask embeddings of all decoder steps.
        pixels: Pixel features, which the steps share.
        targets: The truth at the pixels' size; bool, or fractions of pixels.
        matches: The query of each target; -1 where there is none.
        dtype: Dtype of the result; None: that of ``queries``.
        backend: ``"eager"``: the definition, which builds a mask for every place in ``matches``; ``"triton"``: the kernel, or an
            error; ``"auto"``: the fastest form for this device and size.

    Shape:
        - ``queries``: ``(S, B, N, C)``; ``pixels``: ``(B, C, H, W)``; ``targets``: ``(B, M, H, W)`` in [0, 1]; ``matches``:
          ``(S, B, M)`` int64 in [-1, N).
        - returns two ``(S, B, M)``: bce and dice; 0, without gradient, where there is no match.

    Raises:
        TypeError: If ``queries``, ``pixels`` or ``dtype`` is not floating-point, or ``matches`` are not int64.
        ValueError: If a shape does not fit, or on the CPU a match is out of range; on CUDA that would wait for the device.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> queries, pixels = torch.tensor([[[[0.0], [200.0]]]]), torch.tensor([[[[1.0, -1.0]]]])
        >>> targets = torch.tensor([[[[True, False]], [[False, True]]]])
        >>> matched_mask_losses(queries, pixels, targets, torch.tensor([[[1, -1]]]))
        (tensor([[[0., 0.]]]), tensor([[[0., 0.]]]))
    """
    who = "matched_mask_losses"
    named = {"queries": (queries, "S B N C"), "pixels": (pixels, "B C H W")}
    check_shape(who, **named, targets=(targets, "B M H W"), matches=(matches, "S B M"))
    wide = accumulation_dtype(who, queries=queries, pixels=pixels)
    check_float_dtype(who, "dtype", dtype)
    _check_matches(who, matches, queries.shape[2])
    truth = targets.detach()
    by_kernel = use_triton(who, backend, queries, pixels, truth, kernel=kernel_refusal(queries, pixels, truth) or True)
    rows = _matched_rows(queries, matches)  # (S, B, M, C)
    if by_kernel or (backend != "eager" and _worth_pieces(matches, pixels)):
        values = matches.numel() * pixels.shape[2] * pixels.shape[3]
        learns = torch.is_grad_enabled() and (queries.requires_grad or pixels.requires_grad)
        keep = learns and not by_kernel and values <= _HUGE
        matched = (matches >= 0).permute(1, 2, 0).contiguous()
        losses = compare_matched(rows.permute(1, 2, 0, 3).contiguous(), pixels, truth, matched, keep)[:2]
        bce, dice = (loss.permute(2, 0, 1) for loss in losses)
    else:
        with no_autocast(queries):
            bce, dice = _compare_all(rows.to(wide), pixels.to(wide).flatten(2), truth.to(wide).flatten(2))
        bce, dice = (loss.masked_fill(matches < 0, 0) for loss in (bce, dice))
    return bce.to(dtype or queries.dtype), dice.to(dtype or queries.dtype)


def _check_matches(who: str, matches: Tensor, count: int) -> None:
    if matches.dtype != torch.int64:
        raise TypeError(f"{who}: `matches` must be int64, got {matches.dtype}.")
    if _has_numbers(matches) and matches.numel():
        try:
            low, high = (bound.item() for bound in matches.aminmax())
        except RuntimeError:  # under torch.func.vmap they have none
            return
        if low < -1 or high >= count:
            raise ValueError(f"{who}: `matches` must be in [-1, N) with N={count}, got {low} to {high}.")


def _has_numbers(matches: Tensor) -> bool:
    """Whether they can be looked at without waiting for a device."""
    return matches.device.type == "cpu" and type(matches) is Tensor and not torch.compiler.is_compiling()


def _matched_rows(queries: Tensor, matches: Tensor) -> Tensor:
    """The embeddings of matched queries, ``(S, B, M, C)``; zeros where there is none."""
    if queries.shape[2] == 0:
        queries = F.pad(queries, (0, 0, 0, 1))
    places = matches.clamp(min=0)[..., None].expand(*matches.shape, queries.shape[-1])
    return queries.gather(2, places).masked_fill((matches < 0)[..., None], 0)


def _worth_pieces(matches: Tensor, pixels: Tensor) -> bool:
    """Whether, without a kernel, the registered op beats the definition: where that builds many masks in vain, or large ones."""
    steps, batch, most = matches.shape
    area = pixels.shape[2] * pixels.shape[3]
    if not _has_numbers(matches) or matches.numel() * area < _SMALL:
        return False
    if steps * most * area >= _LARGE:
        return True
    return sum(targets_with_match((matches >= 0).permute(1, 2, 0))) <= 0.75 * batch * most


def _compare_all(rows: Tensor, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses ``(S, B, M)`` of rows ``(S, B, M, C)``, pixels ``(B, C, P)`` and targets ``(B, M, P)``."""
    steps, batch, most = rows.shape[:3]
    masks = torch.bmm(rows.transpose(0, 1).flatten(1, 2), pixels).unflatten(1, (steps, most))
    values, truth = masks.flatten(0, 2), targets[:, None].expand_as(masks).flatten(0, 2)
    bce, dice = mask_bce(values, truth), mask_dice(values, truth)
    return bce.view(batch, steps, most).transpose(0, 1), dice.view(batch, steps, most).transpose(0, 1)
