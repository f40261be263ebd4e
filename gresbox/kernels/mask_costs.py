"""Kernels of ``query_mask_cost``: mask logits are made in registers, priced against every target and dropped.

Sums: a program owns a block of queries of one image over one range of pixels. It reads queries ``(B, N, C)``, pixels ``(B, C, P)``
and targets ``(B, M, P)``, and writes partial sums over its pixels: of softplus and probability ``(B, R, N)`` each, of logit and
probability inside each target ``(B, R, N, M)`` each, and the targets' areas ``(B, R, M)``. Programs that run together share their
pixels, so that these come from memory once, whatever the number of decoder steps behind ``N``.

Closing: a program owns a block of queries of one image. It adds the ranges up and writes the two costs ``(B, N, M)``, and what a
gradient would read, the sums of probabilities ``(B, N)`` and of those inside each target ``(B, N, M)``, all float32.

All sums run in a fixed order, and the ranges depend on sizes alone: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._dot import dot, dot_precision
from gresbox.kernels._launch import Launch, architecture, for_architecture

__all__ = ["compilations", "price"]

Costs = tuple[Tensor, Tensor, Tensor, Tensor]

PROGRAMS = 1024  # about this many share the work of a batch, so that they fill any device and end together
ROWS = 64  # queries of one program of the closing kernel


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    return a * b


@triton.jit
def _read(at, known, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    values = tl.load(at, mask=known, other=0)
    if WIDEN:
        values = values.to(tl.float32)
    return values


@triton.jit
def _add_piece(  # type: ignore[no-untyped-def]
    masks,
    query_at,
    column,
    channel,
    C: tl.constexpr,
    exists,
    inside,
    query_column,
    pixel_row,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the products of some channels."""
    known = channel < C
    query = _read(query_at + channel[None, :] * query_column, exists[:, None] & known[None, :], WIDEN)
    feature = _read(column + channel[:, None] * pixel_row, known[:, None] & inside[None, :], WIDEN)
    return dot(query, feature, masks, PRECISION)


@triton.jit
def _price(masks, inside):  # type: ignore[no-untyped-def]
    """Softplus, summed over the pixels of a tile, and probabilities of logits, from one exponential."""
    # softplus(s) = max(s, 0) + log(1 + exp(-|s|)); one logarithm of the product serves all pixels of the tile
    small = tl.exp2(tl.abs(masks) * -1.4426950408889634)
    grown = tl.where(inside[None, :], 1.0 + small, 1.0)
    logs = tl.log2(tl.reduce(grown, 1, _product)) * 0.6931471805599453
    # sigmoid(s) = 1 / (1 + exp(-s))
    probs = tl.where(inside[None, :], tl.where(masks < 0, small, 1.0) / (1.0 + small), 0.0)
    return tl.sum(tl.maximum(masks, 0.0), axis=1) + logs, probs


@triton.jit
def _inside_targets(masks, probs, truth, agree, overlap, like, WIDEN: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the logits and the probabilities inside each target; 16-bit inputs are multiplied in their own dtype."""
    if not WIDEN:
        if like.dtype.element_ty == tl.float16:
            masks = tl.minimum(tl.maximum(masks, -65504.0), 65504.0)
        masks = masks.to(like.dtype.element_ty)
        probs = probs.to(like.dtype.element_ty)
        truth = truth.to(like.dtype.element_ty)
    return dot(masks, truth, agree, PRECISION), dot(probs, truth, overlap, PRECISION)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    queries,
    pixels,
    targets,
    softplus_sums,
    prob_sums,
    agree_sums,
    overlap_sums,
    areas,
    N,
    M,
    P,
    ranges,
    span,
    query_image,
    query_row,
    query_column,
    pixel_image,
    pixel_row,
    pixel_column,
    target_image,
    target_row,
    target_column,
    C: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Blocks of queries change fastest: programs that run together read the same pixels.
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    block = program % blocks
    part = (program // blocks) % ranges
    image = (program // (blocks * ranges)).to(tl.int64)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    target = tl.arange(0, BLOCK_M)
    real = target < M
    channel = tl.arange(0, BLOCK_C)
    query_at = queries + image * query_image + row[:, None] * query_row
    pixel_at = pixels + image * pixel_image
    target_at = targets + image * target_image + target[None, :] * target_row
    WHOLE: tl.constexpr = BLOCK_C >= C
    if WHOLE:
        whole = _read(query_at + channel[None, :] * query_column, exists[:, None] & (channel < C)[None, :], WIDEN)
    softplus_sum = tl.zeros([BLOCK_N], tl.float32)
    prob_sum = tl.zeros([BLOCK_N], tl.float32)
    agree = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    overlap = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    area = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum((part + 1) * span, P)
    for start in range(part * span, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = pixel < last
        column = pixel_at + pixel[None, :] * pixel_column
        masks = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        # s = Q V
        if WHOLE:
            feature = _read(column + channel[:, None] * pixel_row, (channel < C)[:, None] & inside[None, :], WIDEN)
            masks = dot(whole, feature, masks, PRECISION)
        else:
            for begin in tl.range(0, C, BLOCK_C):
                masks = _add_piece(
                    masks, query_at, column, begin + channel, C, exists, inside, query_column, pixel_row, WIDEN, PRECISION
                )
        softplus, probs = _price(masks, inside)
        softplus_sum += softplus
        prob_sum += tl.sum(probs, axis=1)
        truth = _read(target_at + pixel[:, None] * target_column, inside[:, None] & real[None, :], True)
        area += tl.sum(truth, axis=0)
        agree, overlap = _inside_targets(masks, probs, truth, agree, overlap, pixels, WIDEN, PRECISION)
    piece = image * ranges + part
    tl.store(softplus_sums + piece * N + row, softplus_sum, mask=exists)
    tl.store(prob_sums + piece * N + row, prob_sum, mask=exists)
    pair = (piece * N + row[:, None]) * M + target[None, :]
    both = exists[:, None] & real[None, :]
    tl.store(agree_sums + pair, agree, mask=both)
    tl.store(overlap_sums + pair, overlap, mask=both)
    tl.store(areas + piece * M + target, area, mask=target < tl.where(block == 0, M, 0))


@triton.jit
def _close_kernel(  # type: ignore[no-untyped-def]
    softplus_sums,
    prob_sums,
    agree_sums,
    overlap_sums,
    areas,
    bce,
    dice,
    probs,
    overlaps,
    N,
    M,
    P,
    ranges,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    row = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    target = tl.arange(0, BLOCK_M)
    real = target < M
    both = exists[:, None] & real[None, :]
    softplus = tl.zeros([BLOCK_N], tl.float32)
    prob = tl.zeros([BLOCK_N], tl.float32)
    agree = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    overlap = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    area = tl.zeros([BLOCK_M], tl.float32)
    for part in range(ranges):
        piece = image * ranges + part
        pair = (piece * N + row[:, None]) * M + target[None, :]
        softplus += tl.load(softplus_sums + piece * N + row, mask=exists, other=0.0)
        prob += tl.load(prob_sums + piece * N + row, mask=exists, other=0.0)
        agree += tl.load(agree_sums + pair, mask=both, other=0.0)
        overlap += tl.load(overlap_sums + pair, mask=both, other=0.0)
        area += tl.load(areas + piece * M + target, mask=real, other=0.0)
    at = (image * N + row[:, None]) * M + target[None, :]
    # bce = (sum softplus(s) - sum s y) / P; dice = 1 - (2 sum sigmoid(s) y + 1) / (sum sigmoid(s) + sum y + 1)
    tl.store(bce + at, (softplus[:, None] - agree) / P, mask=both)
    tl.store(dice + at, 1.0 - (2.0 * overlap + 1.0) / (prob[:, None] + area[None, :] + 1.0), mask=both)
    tl.store(probs + image * N + row, prob, mask=exists)
    tl.store(overlaps + at, overlap, mask=both)


@dataclass(frozen=True)
class Settings:
    """Sizes of a program's block and how it runs."""

    queries: int
    pixels: int
    channels: int
    warps: int
    stages: int


NARROW = {
    "sm_80": Settings(64, 32, 256, 4, 2),
    "sm_90": Settings(128, 32, 256, 8, 2),
    "gfx942": Settings(64, 32, 64, 4, 1),
}
TF32 = {
    "sm_80": Settings(64, 32, 32, 8, 2),
    "sm_90": Settings(64, 32, 64, 8, 2),
    "gfx942": Settings(64, 64, 32, 4, 1),
}
IEEE = {
    "sm_80": Settings(32, 32, 32, 4, 2),
    "sm_90": Settings(32, 64, 32, 4, 2),
    "gfx942": Settings(64, 64, 32, 4, 1),
}


def _settings(arch: str, widen: bool, precision: str, channels: int) -> Settings:
    """By architecture, element size and precision; many channels are read piece by piece."""
    found = for_architecture((TF32 if precision == "tf32" else IEEE) if widen else NARROW, arch)
    width = max(16, triton.next_power_of_2(channels))
    piece = found.channels if width <= found.channels else min(found.channels, 64)
    return Settings(found.queries, found.pixels, min(width, piece), found.warps, found.stages)


def _prepare(
    queries: Tensor, pixels: Tensor, targets: Tensor, arch: str, precision: str | None = None
) -> tuple[list[Launch], Costs]:
    """The two launches and the four outputs; pixels and targets are ``(B, C, P)`` and ``(B, M, P)``."""
    batch, count, channels = queries.shape
    most, area = targets.shape[1:]
    widen = torch.float32 in (queries.dtype, pixels.dtype) or queries.dtype != pixels.dtype
    precision = precision or dot_precision(torch.float32 if widen else queries.dtype)
    settings = _settings(arch, widen, precision, channels)
    blocks = triton.cdiv(count, settings.queries)
    tiles = triton.cdiv(area, settings.pixels)
    span = triton.cdiv(tiles, min(triton.cdiv(PROGRAMS, batch * blocks), tiles)) * settings.pixels
    ranges = triton.cdiv(area, span)
    empty = queries.new_empty

    def pairs(*lead: int) -> Tensor:
        return empty((*lead, count, most), dtype=torch.float32)

    partial = {
        "softplus_sums": empty((batch, ranges, count), dtype=torch.float32),
        "prob_sums": empty((batch, ranges, count), dtype=torch.float32),
        "agree_sums": pairs(batch, ranges),
        "overlap_sums": pairs(batch, ranges),
        "areas": empty((batch, ranges, most), dtype=torch.float32),
    }
    outputs = (pairs(batch), pairs(batch), empty((batch, count), dtype=torch.float32), pairs(batch))
    sizes = {"N": count, "M": most, "P": area, "ranges": ranges}
    width = max(16, triton.next_power_of_2(most))
    strides: dict[str, Any] = {}
    for name, tensor in {"query": queries, "pixel": pixels, "target": targets}.items():
        strides |= dict(zip((f"{name}_image", f"{name}_row", f"{name}_column"), tensor.stride(), strict=True))
    constants = {"C": channels, "WIDEN": widen, "BLOCK_N": settings.queries, "BLOCK_P": settings.pixels, "BLOCK_M": width}
    constants |= {"BLOCK_C": settings.channels, "PRECISION": precision}
    inputs = {"queries": queries, "pixels": pixels, "targets": targets}
    sums = Launch(
        _sums_kernel,
        (batch * ranges * blocks,),
        {**inputs, **partial, **sizes, "span": span, **strides, **constants},
        settings.warps,
        settings.stages,
    )
    results = dict(zip(("bce", "dice", "probs", "overlaps"), outputs, strict=True))
    closing = {**partial, **results, **sizes, "BLOCK_N": ROWS, "BLOCK_M": width}
    return [sums, Launch(_close_kernel, (batch * triton.cdiv(count, ROWS),), closing)], outputs


def price(queries: Tensor, pixels: Tensor, targets: Tensor) -> Costs:
    """Costs ``(B, N, M)`` twice, sums of probabilities ``(B, N)`` and of those inside each target ``(B, N, M)``, all float32."""
    truth = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    launches, outputs = _prepare(queries, pixels.flatten(2), truth.flatten(2), architecture(queries))
    for launch in launches:
        launch.run()
    return outputs


def compilations(arch: str) -> dict[str, Launch]:
    """Ten decoder steps at 480 pixels in each dtype, then more channels, and masks of few targets given as bool."""
    found: dict[str, Launch] = {}

    def add(
        name: str, dtype: torch.dtype, channels: int = 256, most: int = 10, truth: torch.dtype = torch.float32, **how: str
    ) -> None:
        queries = torch.empty((8, 1000, channels), dtype=dtype, device="meta")
        pixels = torch.empty((8, channels, 14400), dtype=dtype, device="meta")
        targets = torch.empty((8, most, 14400), dtype=truth, device="meta")
        sums, closing = _prepare(queries, pixels, targets, arch, **how)[0]
        found[f"sums {name}"] = sums
        if name == "bfloat16":
            found["closing"] = closing

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        add(str(dtype).removeprefix("torch."), dtype)
    add("bfloat16, 512 channels", torch.bfloat16, channels=512)
    add("bfloat16, 40 targets as bool", torch.bfloat16, most=40, truth=torch.uint8)
    add("float32, 32 channels", torch.float32, channels=32)
    add("float32 as tf32", torch.float32, precision="tf32")
    return found
