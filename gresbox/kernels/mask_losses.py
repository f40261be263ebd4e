"""Kernels of ``matched_mask_losses``: mask logits of matched queries are made in registers, compared with their target and dropped.

Rows are matched queries, all steps of a target one after the other: row ``r`` of ``R`` belongs to target ``r // S``.

Sums: a program owns a block of rows of one image over one range of pixels. It reads rows ``(B, R, C)``, pixels ``(B, C, P)``,
targets ``(B, M, P)`` and which rows have a match ``(B, R)``, and writes partial sums over its pixels ``(B, ranges, 4, R)``: of the
cross-entropy, of the probability, of the probability inside the target, and of the target. Programs that run together share their
pixels. A block without a match reads none.

Closing: a program owns a block of rows of one image. It adds the ranges up and writes both losses ``(B, R)``, 0 where there is no
match, and what the gradient reads of the sums, ``(2, B, R)``: ``sum p + sum y + 1`` and ``2 sum p y + 1``.

Gradient: a program owns a block of rows over one range of pixels, makes the logits again and writes the gradient of each,
``(B, R, P)``, in the dtype of the products that follow: two plain matrix products give the gradients of rows and pixels.

All sums run in a fixed order, and the ranges depend on sizes alone: the same inputs give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._dot import dot, dot_precision
from gresbox.kernels._launch import Launch, architecture, for_architecture

__all__ = ["compare", "compilations", "differentiate"]

PROGRAMS = 1024  # about this many share the work of a batch, so that they fill any device and end together
ROWS = 128  # of one program of the closing kernel


@triton.jit
def _load_rows(at, channel, exists, step, C: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.load(at + channel[None, :] * step, mask=exists[:, None] & (channel < C)[None, :], other=0.0)
    if WIDEN:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def _load_pixels(at, channel, inside, step, C: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    features = tl.load(at + channel[:, None] * step, mask=(channel < C)[:, None] & inside[None, :], other=0.0)
    if WIDEN:
        features = features.to(tl.float32)
    return features


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    first_rows,
    row_at,
    pixel_at,
    channel,
    exists,
    inside,
    row_step,
    pixel_step,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # s = Q V; the first block of channels is all of them where they fit
    masks = tl.zeros([exists.shape[0], inside.shape[0]], tl.float32)
    if channel.shape[0] >= C:
        masks = dot(first_rows, _load_pixels(pixel_at, channel, inside, pixel_step, C, WIDEN), masks, PRECISION)
    else:
        for begin in tl.range(0, C, channel.shape[0]):
            rows = _load_rows(row_at, begin + channel, exists, row_step, C, WIDEN)
            masks = dot(rows, _load_pixels(pixel_at, begin + channel, inside, pixel_step, C, WIDEN), masks, PRECISION)
    return masks


@triton.jit
def _share(R, P, ranges, span, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Image, rows and range of pixels. Blocks of rows change fastest: programs that run together read the same pixels."""
    blocks = tl.cdiv(R, BLOCK_R)
    program = tl.program_id(0)
    part = (program // blocks) % ranges
    image = (program // (blocks * ranges)).to(tl.int64)
    return image, (program % blocks) * BLOCK_R + tl.arange(0, BLOCK_R), part * span, min(part * span + span, P)


@triton.jit
def _exponential(masks):  # type: ignore[no-untyped-def]
    return tl.exp2(tl.abs(masks) * -1.4426950408889634)  # exp(-|s|)


@triton.jit
def _cross_entropy(masks, small, truth):  # type: ignore[no-untyped-def]
    # softplus(s) - s y, with softplus(s) = max(s, 0) + log(1 + e), e = exp(-|s|); a small e is its own logarithm, almost
    log = tl.where(small < 1e-3, small * (1.0 - 0.5 * small), tl.log2(1.0 + small) * 0.6931471805599453)
    return tl.maximum(masks, 0.0) - masks * truth + log


@triton.jit
def _sigmoid(masks, small):  # type: ignore[no-untyped-def]
    return tl.where(masks < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    rows,
    pixels,
    targets,
    matched,
    partial,
    R,
    S,
    P,
    ranges,
    span,
    row_image,
    row_row,
    row_channel,
    pixel_image,
    pixel_channel,
    pixel_pixel,
    target_image,
    target_row,
    target_pixel,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, row, first, end = _share(R, P, ranges, span, BLOCK_R)
    exists = row < R
    match = tl.load(matched + image * R + row, mask=exists, other=0) != 0
    channel = tl.arange(0, BLOCK_C)
    row_at = rows + image * row_image + row[:, None] * row_row
    pixel_at = pixels + image * pixel_image
    target_at = targets + image * target_image + (row // S)[:, None] * target_row
    first_rows = _load_rows(row_at, channel, exists, row_channel, C, WIDEN)

    loss = tl.zeros([BLOCK_R], tl.float32)
    prob_sum = tl.zeros([BLOCK_R], tl.float32)
    overlap = tl.zeros([BLOCK_R], tl.float32)
    area = tl.zeros([BLOCK_R], tl.float32)
    last = tl.where(tl.max(match.to(tl.int32), axis=0) > 0, end, first)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < last
        column = pixel_at + pixel[None, :] * pixel_pixel
        masks = _logits(first_rows, row_at, column, channel, exists, inside, row_channel, pixel_channel, C, WIDEN, PRECISION)
        both = match[:, None] & inside[None, :]
        truth = tl.load(target_at + pixel[None, :] * target_pixel, mask=both, other=0).to(tl.float32)
        small = _exponential(masks)
        loss += tl.sum(tl.where(both, _cross_entropy(masks, small, truth), 0.0), axis=1)
        probs = tl.where(both, _sigmoid(masks, small), 0.0)
        prob_sum += tl.sum(probs, axis=1)
        overlap += tl.sum(probs * truth, axis=1)
        area += tl.sum(truth, axis=1)

    at = partial + (image * ranges + first // span) * 4 * R + row
    tl.store(at, loss, mask=exists)
    tl.store(at + R, prob_sum, mask=exists)
    tl.store(at + 2 * R, overlap, mask=exists)
    tl.store(at + 3 * R, area, mask=exists)


@triton.jit
def _close_kernel(partial, matched, bce, dice, sums, R, P, ranges, sums_plane, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(R, BLOCK_R)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < R
    loss = tl.zeros([BLOCK_R], tl.float32)
    prob_sum = tl.zeros([BLOCK_R], tl.float32)
    overlap = tl.zeros([BLOCK_R], tl.float32)
    area = tl.zeros([BLOCK_R], tl.float32)
    for part in range(ranges):
        at = partial + (image * ranges + part) * 4 * R + row
        loss += tl.load(at, mask=exists, other=0.0)
        prob_sum += tl.load(at + R, mask=exists, other=0.0)
        overlap += tl.load(at + 2 * R, mask=exists, other=0.0)
        area += tl.load(at + 3 * R, mask=exists, other=0.0)
    match = tl.load(matched + image * R + row, mask=exists, other=0) != 0
    union = prob_sum + area + 1.0
    shared = 2.0 * overlap + 1.0
    # bce = sum (softplus(s) - s y) / P; dice = 1 - (2 sum p y + 1) / (sum p + sum y + 1)
    tl.store(bce + image * R + row, tl.where(match, loss / P, 0.0), mask=exists)
    tl.store(dice + image * R + row, tl.where(match, 1.0 - shared / union, 0.0), mask=exists)
    tl.store(sums + image * R + row, union, mask=exists)
    tl.store(sums + sums_plane + image * R + row, shared, mask=exists)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    rows,
    pixels,
    targets,
    matched,
    grad_bce,
    grad_dice,
    sums,
    grad_masks,
    R,
    S,
    P,
    ranges,
    span,
    sums_plane,
    row_image,
    row_row,
    row_channel,
    pixel_image,
    pixel_channel,
    pixel_pixel,
    target_image,
    target_row,
    target_pixel,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, row, first, end = _share(R, P, ranges, span, BLOCK_R)
    exists = row < R
    match = tl.load(matched + image * R + row, mask=exists, other=0) != 0
    channel = tl.arange(0, BLOCK_C)
    row_at = rows + image * row_image + row[:, None] * row_row
    pixel_at = pixels + image * pixel_image
    target_at = targets + image * target_image + (row // S)[:, None] * target_row
    grad_at = grad_masks + (image * R + row[:, None]) * P
    last = tl.where(tl.max(match.to(tl.int32), axis=0) > 0, end, first)
    for start in range(last, end, BLOCK_P):  # only where no row has a match
        pixel = start + tl.arange(0, BLOCK_P)
        nothing = tl.zeros([BLOCK_R, BLOCK_P], tl.float32).to(grad_masks.dtype.element_ty)
        tl.store(grad_at + pixel[None, :], nothing, mask=exists[:, None] & (pixel < end)[None, :])

    union = tl.load(sums + image * R + row, mask=exists, other=1.0)
    shared = tl.load(sums + sums_plane + image * R + row, mask=exists, other=0.0)
    # dL/ds = g_bce (p - y) / P + g_dice p (1 - p) ((2 sum p y + 1) / D^2 - 2 y / D), D = sum p + sum y + 1
    to_terms = tl.load(grad_bce + image * R + row, mask=exists, other=0.0) / P
    to_dice = tl.load(grad_dice + image * R + row, mask=exists, other=0.0) / union
    everywhere = to_dice * shared / union
    first_rows = _load_rows(row_at, channel, exists, row_channel, C, WIDEN)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < last
        column = pixel_at + pixel[None, :] * pixel_pixel
        masks = _logits(first_rows, row_at, column, channel, exists, inside, row_channel, pixel_channel, C, WIDEN, PRECISION)
        both = match[:, None] & inside[None, :]
        truth = tl.load(target_at + pixel[None, :] * target_pixel, mask=both, other=0).to(tl.float32)
        small = _exponential(masks)
        probs = _sigmoid(masks, small)
        curve = small / ((1.0 + small) * (1.0 + small))  # p (1 - p)
        change = to_terms[:, None] * (probs - truth) + curve * (everywhere[:, None] - 2.0 * to_dice[:, None] * truth)
        change = tl.where(both, change, 0.0).to(grad_masks.dtype.element_ty)
        tl.store(grad_at + pixel[None, :], change, mask=exists[:, None] & inside[None, :])


@dataclass(frozen=True)
class _Tile:
    rows: int  # at most: fewer where there are fewer
    pixels: int
    channels: int  # at most; all at once where they fit, else in pieces of 64
    warps: int
    stages: int


NARROW = {
    "sm_80": _Tile(64, 64, 256, 8, 2),
    "sm_90": _Tile(64, 64, 256, 8, 2),
    "gfx942": _Tile(64, 32, 256, 4, 1),
}
WIDE = {
    "sm_80": _Tile(32, 64, 32, 8, 2),
    "sm_90": _Tile(32, 64, 32, 8, 2),
    "gfx942": _Tile(32, 32, 32, 4, 1),
}


@dataclass(frozen=True)
class _Inputs:
    """Rows ``(B, R, C)``, pixels ``(B, C, P)``, targets ``(B, M, P)``, matched ``(B, R)``, and what every launch says of them."""

    rows: Tensor
    pixels: Tensor
    targets: Tensor
    matched: Tensor

    @property
    def widen(self) -> bool:
        """Whether products are made of float32 operands."""
        return self.rows.dtype != self.pixels.dtype or self.rows.dtype == torch.float32

    def arguments(self, arch: str) -> tuple[tuple[int, ...], dict[str, Any], _Tile]:
        """Grid, arguments and tile of the kernels that build masks."""
        batch, count, dim = self.rows.shape
        area = self.pixels.shape[2]
        tile = for_architecture(WIDE if self.widen else NARROW, arch)
        width = max(16, triton.next_power_of_2(dim))
        block = min(tile.rows, max(16, triton.next_power_of_2(count)))
        blocks = triton.cdiv(count, block)
        steps = triton.cdiv(area, tile.pixels)
        span = triton.cdiv(steps, min(triton.cdiv(PROGRAMS, max(batch * blocks, 1)), max(steps, 1))) * tile.pixels
        ranges = triton.cdiv(area, max(span, 1))
        found: dict[str, Any] = {"rows": self.rows, "pixels": self.pixels, "targets": self.targets, "matched": self.matched}
        found |= {"R": count, "S": count // max(self.targets.shape[1], 1), "P": area, "ranges": ranges, "span": span}
        for name, tensor, axes in (
            ("row", self.rows, ("image", "row", "channel")),
            ("pixel", self.pixels, ("image", "channel", "pixel")),
            ("target", self.targets, ("image", "row", "pixel")),
        ):
            found |= {f"{name}_{axis}": step for axis, step in zip(axes, tensor.stride(), strict=True)}
        channels = width if width <= tile.channels else min(tile.channels, 64)
        found |= {"C": dim, "WIDEN": self.widen, "BLOCK_R": block, "BLOCK_P": tile.pixels, "BLOCK_C": channels}
        found["PRECISION"] = dot_precision(torch.float32 if self.widen else self.rows.dtype)
        return (batch * ranges * blocks,), found, tile


def _prepare_losses(arch: str, inputs: _Inputs, bce: Tensor, dice: Tensor, sums: Tensor) -> tuple[Launch, Launch]:
    grid, arguments, tile = inputs.arguments(arch)
    (batch, count), ranges = inputs.matched.shape, arguments["ranges"]
    shared = {"partial": bce.new_empty((batch, ranges, 4, count))}
    first = Launch(_sums_kernel, grid, arguments | shared, tile.warps, tile.stages)
    closing = shared | {"matched": inputs.matched, "bce": bce, "dice": dice, "sums": sums, "sums_plane": sums.stride(0)}
    closing |= {"R": count, "P": arguments["P"], "ranges": ranges, "BLOCK_R": ROWS}
    return first, Launch(_close_kernel, (batch * triton.cdiv(count, ROWS),), closing)


def _prepare_gradient(arch: str, inputs: _Inputs, grad_bce: Tensor, grad_dice: Tensor, sums: Tensor, grad_masks: Tensor) -> Launch:
    grid, arguments, tile = inputs.arguments(arch)
    arguments |= {
        "grad_bce": grad_bce,
        "grad_dice": grad_dice,
        "sums": sums,
        "sums_plane": sums.stride(0),
        "grad_masks": grad_masks,
    }
    return Launch(_gradient_kernel, grid, arguments, tile.warps, tile.stages)


def _flat(rows: Tensor, pixels: Tensor, targets: Tensor, matched: Tensor) -> _Inputs:
    """All steps of all targets in one axis, and all pixels in one; flags and truth as bytes."""
    truth = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    flags = matched.flatten(1).contiguous().view(torch.uint8)
    return _Inputs(rows.flatten(1, 2), pixels.flatten(2), truth.flatten(2), flags)


def compare(rows: Tensor, pixels: Tensor, targets: Tensor, matched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(B, M, S, C)``, pixels ``(B, C, H, W)``, targets ``(B, M, H, W)``, matched ``(B, M, S)`` to losses and sums."""
    bce, dice = (rows.new_empty(matched.shape, dtype=torch.float32) for _ in range(2))
    sums = rows.new_empty((2, *matched.shape), dtype=torch.float32)
    for launch in _prepare_losses(architecture(rows), _flat(rows, pixels, targets, matched), bce, dice, sums):
        launch.run()
    return bce, dice, sums


def differentiate(
    grads: tuple[Tensor, Tensor],
    rows: Tensor,
    pixels: Tensor,
    targets: Tensor,
    matched: Tensor,
    sums: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and pixels for those of the losses, ``(B, M, S)`` each."""
    inputs = _flat(rows, pixels, targets, matched)
    (batch, count, _), area = inputs.rows.shape, inputs.pixels.shape[2]
    dtype = torch.float32 if inputs.widen else rows.dtype
    grad_masks = rows.new_empty((batch, count, area), dtype=dtype)
    grad_bce, grad_dice = (grad.contiguous() for grad in grads)
    scale = _scale_of(grad_bce, grad_dice, area) if dtype == torch.float16 and count * area else None
    if scale is not None:
        grad_bce, grad_dice = grad_bce * scale, grad_dice * scale
    _prepare_gradient(architecture(rows), inputs, grad_bce, grad_dice, sums, grad_masks).run()

    def gradient(product: Tensor, leaf: Tensor) -> Tensor:
        return (product if scale is None else product / scale).to(leaf.dtype).view(leaf.shape)

    grad_rows = gradient(torch.bmm(grad_masks, inputs.pixels.to(dtype).mT), rows) if needs[0] else None
    grad_pixels = gradient(torch.bmm(inputs.rows.to(dtype).mT, grad_masks), pixels) if needs[1] else None
    return grad_rows, grad_pixels


def _scale_of(grad_bce: Tensor, grad_dice: Tensor, area: int) -> Tensor:
    """A power of two for the gradients of losses, so that float16 keeps the digits of the logits', thousands of times smaller.

    A loss shares its gradient out among ``area`` pixels. With at most 1 for each, and at most 2^10 for all of them, products with
    pixels and rows below 32 stay within float16. It is a number of float16 itself, as CUDA divides by it in that dtype.
    """
    largest = torch.maximum(grad_bce.abs().amax(), grad_dice.abs().amax())
    return torch.exp2(torch.floor(min(10.0, math.log2(area)) - torch.log2(largest))).clamp(2.0**-14, 2.0**15)


def compilations(arch: str) -> dict[str, Launch]:
    """Ten decoder steps of ten targets at 480 pixels in each dtype; then few rows, more channels, mixed dtypes, targets as bool."""
    half, full = torch.bfloat16, torch.float32
    found: dict[str, Launch] = {}

    def add(
        name: str, of_rows: torch.dtype, of_pixels: torch.dtype, count: int = 100, dim: int = 256, truth: torch.dtype = full
    ) -> None:
        rows = torch.empty((8, count, dim), dtype=of_rows, device="meta")
        pixels = torch.empty((8, dim, 14400), dtype=of_pixels, device="meta")
        targets = torch.empty((8, count // 10, 14400), dtype=truth, device="meta")
        inputs = _Inputs(rows, pixels, targets, torch.empty((8, count), dtype=torch.uint8, device="meta"))
        loss, sums = torch.empty((8, count), device="meta"), torch.empty((2, 8, count), device="meta")
        grad_masks = torch.empty((8, count, 14400), dtype=full if inputs.widen else of_rows, device="meta")
        found[f"sums, {name}"], closing = _prepare_losses(arch, inputs, loss, loss, sums)
        found[f"gradient, {name}"] = _prepare_gradient(arch, inputs, loss, loss, sums, grad_masks)
        if len(found) == 2:
            found["closing"] = closing

    add("bfloat16", half, half)
    add("float16", torch.float16, torch.float16)
    add("float32", full, full)
    add("float32 and bfloat16", full, half)
    add("bfloat16, 10 rows", half, half, count=10)
    add("bfloat16, 512 channels", half, half, dim=512)
    add("float32, 32 channels", full, full, dim=32)
    add("bfloat16, targets as bool", half, half, truth=torch.uint8)
    if arch.startswith("sm"):
        for kernel in ("sums", "gradient"):
            launch = found[f"{kernel}, float32"]
            found[f"{kernel}, tf32"] = replace(launch, arguments=launch.arguments | {"PRECISION": "tf32"})
    return found
