"""The registered op behind ``matched_mask_losses``: piece by piece, so that masks without a match are never built.

With ``D = sum p + sum y + 1`` the gradients of the losses of one mask are

    d bce / ds_x = (p_x - y_x) / P,    d dice / ds_x = p_x (1 - p_x) ((2 sum p y + 1) / D^2 - 2 y_x / D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops._pixel_chunks import Piece, pieces_of, write_product
from gresbox.ops._register import Forms, define_op

__all__ = ["compare_matched", "kernel_refusal", "targets_with_match"]

_Found = tuple[Tensor, Tensor, Tensor, Tensor]


def compare_pieces(rows: Tensor, pixels: Tensor, targets: Tensor, matched: Tensor, keep: bool) -> _Found:
    """Losses ``(B, M, S)`` of rows ``(B, M, S, C)``; the sums ``D`` and ``2 sum p y + 1``; the probabilities if they are kept."""
    bce, dice, sums, probs = _empty(rows, pixels, targets, matched, keep)
    area = pixels.shape[2] * pixels.shape[3]
    totals = torch.zeros((3, *matched.shape), dtype=bce.dtype, device=bce.device)  # of the terms, of p and of p y
    for image, count, piece in _pieces(pixels, matched):
        masks, truth = _masks(rows, pixels, image, count, piece, bce.dtype), _truth(targets, image, count, piece, bce.dtype)
        terms = torch.addcmul(F.softplus(masks, threshold=40), masks, truth, value=-1)
        prob = masks.sigmoid_()
        if keep:
            piece.of(_of_image(probs, image, count)).copy_(prob.flatten(1, 2))
        totals[0, image, :count] += terms.sum(-1).sum(0)
        totals[1, image, :count] += prob.sum(-1).sum(0)
        totals[2, image, :count] += prob.mul_(truth).sum(-1).sum(0)
    covered = targets.flatten(2).sum(-1, dtype=bce.dtype)[..., None]
    torch.add(totals[1], covered + 1, out=sums[0])
    torch.add(totals[2] * 2, 1, out=sums[1])
    for loss, values in ((bce, totals[0] / max(area, 1)), (dice, 1 - sums[1] / sums[0])):
        loss.copy_(values.masked_fill(~matched, 0))
    return bce, dice, sums, probs


def differentiate_pieces(
    grad_bce: Tensor,
    grad_dice: Tensor,
    rows: Tensor,
    pixels: Tensor,
    targets: Tensor,
    matched: Tensor,
    keep: bool,
    sums: Tensor,
    probs: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and pixels; masks are built again where their probabilities were not kept."""
    dtype, features = sums.dtype, pixels.flatten(2)
    to_terms = (grad_bce / max(features.shape[2], 1)).masked_fill(~matched, 0)[..., None]
    to_inside = (grad_dice * -2 / sums[0]).masked_fill(~matched, 0)[..., None]
    to_all = to_inside * (sums[1] / sums[0])[..., None] / -2
    grad_rows = torch.zeros(rows.shape, dtype=dtype, device=rows.device) if needs[0] else None
    grad_pixels = torch.empty(features.shape, dtype=pixels.dtype, device=pixels.device) if needs[1] else None
    if grad_pixels is not None:
        for image, count in enumerate(targets_with_match(matched)):
            if count == 0:
                grad_pixels[image] = 0
    for image, count, piece in _pieces(pixels, matched):
        row, feature = _of_image(rows, image, count).to(dtype), piece.of(features[image, None]).to(dtype)
        at, truth = (image, slice(count)), _truth(targets, image, count, piece, dtype)
        if keep:
            prob = piece.of(_of_image(probs, image, count)).unflatten(1, (count, -1))
        else:
            prob = _masks(rows, pixels, image, count, piece, dtype).sigmoid_()
        slope = torch.addcmul(prob, prob, prob, value=-1)
        slope *= torch.addcmul(to_all[at], to_inside[at], truth)
        grad_masks = slope.addcmul_(to_terms[at], prob - truth).flatten(1, 2)
        if grad_rows is not None:
            grad_rows[image, :count] += torch.bmm(grad_masks, feature.mT).sum(0).view(count, *rows.shape[2:])
        if grad_pixels is not None:
            write_product(piece.each(row.mT), grad_masks, piece.of(grad_pixels[image, None]))
    return (
        None if grad_rows is None else grad_rows.to(rows.dtype),
        None if grad_pixels is None else grad_pixels.view(pixels.shape),
    )


def _pieces(pixels: Tensor, matched: Tensor) -> Iterator[tuple[int, int, Piece]]:
    """Image, how many of its targets are looked at, and a piece of that image alone."""
    channels, area = pixels.shape[1], pixels.shape[2] * pixels.shape[3]
    for image, count in enumerate(targets_with_match(matched)):
        if count:
            for piece in pieces_of(1, count * matched.shape[2], channels, area, 0, pixels.device):
                yield image, count, piece


def _of_image(values: Tensor, image: int, count: int) -> Tensor:
    """``(B, M, S, ...)`` to ``(1, count S, ...)``, a view."""
    return values[image, :count].flatten(0, 1)[None]


def targets_with_match(matched: Tensor) -> list[int]:
    """How many targets of each image, from the first on, have all its matches; a device is not asked."""
    batch, most, steps = matched.shape
    if matched.device.type != "cpu" or matched.numel() == 0:
        return [most if steps else 0] * batch
    return (matched.any(2) * torch.arange(1, most + 1, device=matched.device)).amax(1).tolist()


def _masks(rows: Tensor, pixels: Tensor, image: int, count: int, piece: Piece, dtype: torch.dtype) -> Tensor:
    """Logits ``(parts, count, S, pixels of each)``."""
    row, feature = _of_image(rows, image, count).to(dtype), piece.of(pixels[image, None].flatten(2)).to(dtype)
    return torch.bmm(piece.each(row), feature).unflatten(1, (count, -1))


def _truth(targets: Tensor, image: int, count: int, piece: Piece, dtype: torch.dtype) -> Tensor:
    """``(parts, count, 1, pixels of each)``."""
    return piece.of(targets[image, None, :count].flatten(2))[:, :, None].to(dtype)


def _empty(rows: Tensor, pixels: Tensor, targets: Tensor, matched: Tensor, keep: bool) -> _Found:
    """The op's outputs, not filled."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, pixels.dtype), torch.float32)
    loss = rows.new_empty(matched.shape, dtype=dtype)
    probs = rows.new_empty((*matched.shape, pixels.shape[2] * pixels.shape[3]) if keep else (0,), dtype=dtype)
    return loss, torch.empty_like(loss), rows.new_empty((2, *matched.shape), dtype=dtype), probs


def _compare_by_kernel(rows: Tensor, pixels: Tensor, targets: Tensor, matched: Tensor, keep: bool) -> _Found:
    from gresbox.kernels.mask_losses import compare

    bce, dice, sums = compare(rows, pixels, targets, matched)
    return bce, dice, sums, bce.new_empty((0,))


def _differentiate_by_kernel(
    grad_bce: Tensor,
    grad_dice: Tensor,
    rows: Tensor,
    pixels: Tensor,
    targets: Tensor,
    matched: Tensor,
    keep: bool,
    sums: Tensor,
    probs: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    from gresbox.kernels.mask_losses import differentiate

    return differentiate((grad_bce, grad_dice), rows, pixels, targets, matched, sums, (needs[0], needs[1]))


def kernel_refusal(rows: Tensor, pixels: Tensor, targets: Tensor, *others: object) -> str | None:
    """Why the kernel cannot take these inputs, or None; ``rows`` may be anything whose last axis is C."""
    if 0 in (*rows.shape, *pixels.shape, *targets.shape):
        return "some axis has no element"
    for tensor in (pixels, targets):  # addresses inside one image are 32 bits wide
        if sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
            return "one image reaches over more than 2**31 values"
    return None


compare_matched = define_op(
    "matched_mask_losses(Tensor rows, Tensor pixels, Tensor targets, Tensor matched, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty,
    forward=Forms(compare_pieces, _compare_by_kernel, lambda *args: "masks are kept" if args[4] else kernel_refusal(*args)),
    backward=Forms(
        differentiate_pieces, _differentiate_by_kernel, lambda *args: "masks are kept" if args[6] else kernel_refusal(*args[2:])
    ),
    differentiable=("rows", "pixels"),
    auxiliary=(2, 3),
)
