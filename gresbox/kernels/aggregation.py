"""Kernels of ``aggregate_queries`` with PReLU: masks are made in registers, merged and dropped.

Forward: a program owns a block of pixels of one image and all its queries. It reads queries ``(B, N, C)``, pixels ``(B, C, P)``,
scores ``(B, N)`` and slopes, and writes merged logits ``(B, P)``. Where a backward pass is to follow it also writes on which side
of zero each mask is, one bit per query and pixel, ``(B, N, ceil(P / 32))`` int32: the gradient needs nothing else of the masks,
so that no later kernel builds them again.

Backward, with ``M`` the logits' gradient where a mask is positive and 0 elsewhere, and one more query that is positive
everywhere:

- to pixels: a program owns channels times pixels of one image; it reads bits, queries and the logits' gradient, writes ``(B, C,
  P)``.
- to queries: a program owns queries times channels of one range of pixels; it writes a partial sum of ``M V^t``, ``(B, ranges, N
  + 1, C)``.
- closing: a program owns one query of one image; it adds the partial sums up and writes the gradients of query, score and slope.

All sums run in a fixed order, and the ranges depend on sizes alone: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._dot import dot, dot_precision
from gresbox.kernels._launch import Launch, architecture, for_architecture

__all__ = ["compilations", "merge", "unmerge"]


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    queries,
    pixels,
    scores,
    slope,
    merged,
    sides,
    N,
    C,
    P,
    words,
    query_image,
    query_row,
    query_column,
    pixel_image,
    pixel_row,
    pixel_column,
    score_image,
    score_column,
    slope_step,
    KEEP: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    place = tl.arange(0, BLOCK_P)
    inside = place < P - start
    column = pixels + image * pixel_image + start * pixel_column + place * pixel_column
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        masks = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for channels in range(0, C, BLOCK_C):
            channel = channels + tl.arange(0, BLOCK_C)
            known = channel < C
            at = queries + image * query_image + row[:, None] * query_row + channel[None, :] * query_column
            query = tl.load(at, mask=exists[:, None] & known[None, :], other=0.0)
            feature = tl.load(column[None, :] + channel[:, None] * pixel_row, mask=known[:, None] & inside[None, :], other=0.0)
            if WIDEN:
                query = query.to(tl.float32)
                feature = feature.to(tl.float32)
            masks = dot(query, feature, masks, PRECISION)  # s = Q V
        above = masks > 0
        if KEEP:
            bits = tl.reshape(above.to(tl.int32), [BLOCK_N, BLOCK_P // 32, 32]) << tl.arange(0, 32)[None, None, :]
            word = start // 32 + tl.arange(0, BLOCK_P // 32)
            at_word = sides + (image * N + row[:, None]) * words + word[None, :]
            tl.store(at_word, tl.sum(bits, axis=2), mask=exists[:, None] & (word < words)[None, :])
        score = tl.load(scores + image * score_image + row * score_column, mask=exists, other=0.0).to(tl.float32)
        factor = tl.load(slope + row * slope_step, mask=exists, other=0.0).to(tl.float32)
        # z = sum_i p_i PReLU(s_i; a_i)
        weighted = score[:, None] * tl.where(above, masks, factor[:, None] * masks)
        total += tl.sum(tl.where(exists[:, None], weighted, 0.0), axis=0)
    tl.store(merged + image * P + start + place, total, mask=inside)


@triton.jit
def _to_pixels_kernel(  # type: ignore[no-untyped-def]
    grad,
    queries,
    scores,
    slope,
    sides,
    grad_pixels,
    N,
    C,
    P,
    words,
    query_image,
    query_row,
    query_column,
    score_image,
    score_column,
    slope_step,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    place = tl.arange(0, BLOCK_P)
    inside = place < P - start
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        at = queries + image * query_image + row[None, :] * query_row + channel[:, None] * query_column
        query = tl.load(at, mask=known[:, None] & exists[None, :], other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        at_word = sides + (image * N + row[:, None]) * words + (start // 32 + place // 32)[None, :]
        word = tl.load(at_word, mask=exists[:, None] & inside[None, :], other=0)
        above = ((word >> (place % 32)[None, :]) & 1) != 0
        score = tl.load(scores + image * score_image + row * score_column, mask=exists, other=0.0).to(tl.float32)
        factor = tl.load(slope + row * slope_step, mask=exists, other=0.0).to(tl.float32)
        # dz/ds_i = p_i (1 where s_i > 0, else a_i)
        weight = score[:, None] * tl.where(above, 1.0, factor[:, None])
        total = dot(query, weight.to(query.dtype), total, PRECISION)
    gradient = tl.load(grad + image * P + start + place, mask=inside, other=0.0).to(tl.float32)
    # dV = g sum_i Q_i dz/ds_i
    total = total * gradient[None, :]
    at = grad_pixels + image * C * P + channel[:, None] * P + start + place[None, :]
    tl.store(at, total.to(grad_pixels.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit
def _to_queries_kernel(  # type: ignore[no-untyped-def]
    grad,
    pixels,
    sides,
    partial,
    N,
    C,
    P,
    words,
    ranges,
    length,
    pixel_image,
    pixel_row,
    pixel_column,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = (tl.program_id(0) // ranges).to(tl.int64)
    part = tl.program_id(0) % ranges
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for step in range(0, length, BLOCK_P):
        place = part * length + step + tl.arange(0, BLOCK_P)
        inside = (place < P) & (place < (part + 1) * length)
        at = pixels + image * pixel_image + channel[:, None] * pixel_row + place[None, :] * pixel_column
        feature = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            feature = feature.to(tl.float32)
        at_word = sides + (image * N + row[:, None]) * words + (place // 32)[None, :]
        word = tl.load(at_word, mask=exists[:, None] & inside[None, :], other=0)
        above = ((word >> (place % 32)[None, :]) & 1) != 0
        gradient = tl.load(grad + image * P + place, mask=inside, other=0.0).to(tl.float32)
        # A_i = sum_x g [s_i > 0] V; the query after the last one has no sign: u = sum_x g V
        kept = tl.where(above | (row == N)[:, None], gradient[None, :], 0.0)
        total = dot(kept.to(feature.dtype), tl.trans(feature), total, PRECISION)
    at = partial + ((image * ranges + part) * (N + 1) + row[:, None]) * C + channel[None, :]
    tl.store(at, total, mask=(row <= N)[:, None] & known[None, :])


@triton.jit
def _close_kernel(  # type: ignore[no-untyped-def]
    partial,
    queries,
    scores,
    slope,
    grad_queries,
    grad_scores,
    grad_slope,
    N,
    C,
    ranges,
    query_image,
    query_row,
    query_column,
    score_image,
    score_column,
    slope_step,
    BLOCK_C: tl.constexpr,
):
    image = (tl.program_id(0) // N).to(tl.int64)
    row = tl.program_id(0) % N
    channel = tl.arange(0, BLOCK_C)
    known = channel < C
    above = tl.zeros([BLOCK_C], tl.float32)
    everywhere = tl.zeros([BLOCK_C], tl.float32)
    for part in range(ranges):
        at = partial + (image * ranges + part) * (N + 1) * C + channel
        above += tl.load(at + row * C, mask=known, other=0.0)
        everywhere += tl.load(at + N * C, mask=known, other=0.0)
    at = queries + image * query_image + row * query_row + channel * query_column
    query = tl.load(at, mask=known, other=0.0).to(tl.float32)
    score = tl.load(scores + image * score_image + row * score_column, mask=row < N, other=0.0).to(tl.float32)
    factor = tl.load(slope + row * slope_step, mask=row < N, other=0.0).to(tl.float32)
    below = everywhere - above
    change = above + factor * below
    at = grad_queries + (image * N + row) * C + channel
    # dQ_i = p_i (A_i + a_i (u - A_i)), da_i = p_i Q_i . (u - A_i); PReLU is its slope times its argument: dp_i = Q_i . dQ_i / p_i
    tl.store(at, (score * change).to(grad_queries.dtype.element_ty), mask=known)
    to_score = tl.sum(query * change, axis=0)
    tl.store(grad_scores + image * N + row, to_score.to(grad_scores.dtype.element_ty), mask=row < N)
    tl.store(grad_slope + image * N + row, score * tl.sum(query * below, axis=0), mask=row < N)


@dataclass(frozen=True)
class _Tile:
    queries: int  # at most: smaller where there are fewer
    pixels: int
    channels: int
    stages: int


_WARPS = 8
_PROGRAMS = 512  # about as many as fill a large GPU twice; the number of partial sums follows from it

# By bytes per number of the matrix product's operands.
_MERGE = {
    "sm_80": {2: _Tile(128, 128, 64, 3), 4: _Tile(64, 64, 16, 2)},
    "sm_90": {2: _Tile(128, 128, 64, 3), 4: _Tile(64, 64, 16, 3)},
    "gfx942": {2: _Tile(128, 64, 64, 2), 4: _Tile(64, 64, 16, 2)},
}
_TO_PIXELS = {
    "sm_80": {2: _Tile(32, 128, 128, 2), 4: _Tile(16, 64, 64, 2)},
    "sm_90": {2: _Tile(32, 128, 128, 2), 4: _Tile(16, 64, 64, 2)},
    "gfx942": {2: _Tile(32, 128, 128, 2), 4: _Tile(16, 64, 64, 2)},
}
_TO_QUERIES = {
    "sm_80": {2: _Tile(128, 64, 128, 2), 4: _Tile(64, 16, 64, 2)},
    "sm_90": {2: _Tile(128, 64, 128, 3), 4: _Tile(64, 16, 64, 2)},
    "gfx942": {2: _Tile(128, 32, 128, 2), 4: _Tile(64, 16, 64, 2)},
}


@dataclass(frozen=True)
class _Inputs:
    """The op's inputs, pixels as ``(B, C, P)``, and what every launch says of them."""

    queries: Tensor
    pixels: Tensor
    scores: Tensor
    slope: Tensor

    def settings(self, table: dict[str, dict[int, _Tile]], arch: str, rows: int) -> tuple[_Tile, dict[str, Any]]:
        """The tile, and the constants that follow from it and the dtypes."""
        widen = self.queries.dtype != self.pixels.dtype
        tile = for_architecture(table, arch)[4 if widen else self.queries.element_size()]
        block = min(tile.queries, max(16, triton.next_power_of_2(rows)))
        precision = dot_precision(self.queries.dtype, self.pixels.dtype)
        blocks = {"BLOCK_N": block, "BLOCK_P": tile.pixels, "BLOCK_C": tile.channels}
        return tile, {"WIDEN": widen, "PRECISION": precision, **blocks}

    def sizes(self) -> dict[str, int]:
        area = self.pixels.shape[2]
        return {"N": self.queries.shape[1], "C": self.queries.shape[2], "P": area, "words": triton.cdiv(area, 32)}

    def of_queries(self) -> dict[str, Any]:
        named = {"queries": self.queries, "scores": self.scores, "slope": self.slope}
        strides = (*self.queries.stride(), *self.scores.stride(), self.slope.stride(0) if self.slope.ndim else 0)
        names = ("query_image", "query_row", "query_column", "score_image", "score_column", "slope_step")
        return named | dict(zip(names, strides, strict=True))

    def of_pixels(self) -> dict[str, Any]:
        names = ("pixel_image", "pixel_row", "pixel_column")
        return {"pixels": self.pixels} | dict(zip(names, self.pixels.stride(), strict=True))


def _merging(arch: str, inputs: _Inputs, merged: Tensor, sides: Tensor) -> Launch:
    tile, settings = inputs.settings(_MERGE, arch, inputs.queries.shape[1])
    arguments = inputs.of_queries() | inputs.of_pixels() | inputs.sizes() | settings
    arguments |= {"merged": merged, "sides": sides, "KEEP": sides.ndim == 3}
    grid = (triton.cdiv(arguments["P"], tile.pixels), inputs.queries.shape[0])
    return Launch(_merge_kernel, grid, arguments, _WARPS, tile.stages)


def _to_pixels(arch: str, grad: Tensor, sides: Tensor, inputs: _Inputs, out: Tensor) -> Launch:
    tile, settings = inputs.settings(_TO_PIXELS, arch, inputs.queries.shape[1])
    arguments = inputs.of_queries() | inputs.sizes() | settings
    arguments |= {"grad": grad, "sides": sides, "grad_pixels": out}
    grid = (triton.cdiv(arguments["P"], tile.pixels), triton.cdiv(arguments["C"], tile.channels), inputs.queries.shape[0])
    return Launch(_to_pixels_kernel, grid, arguments, _WARPS, tile.stages)


def _to_queries(arch: str, grad: Tensor, sides: Tensor, inputs: _Inputs) -> Launch:
    batch, count, dim = inputs.queries.shape
    tile, settings = inputs.settings(_TO_QUERIES, arch, count + 1)
    ranges, length = _ranges(tile.pixels, batch, inputs.pixels.shape[2])
    partial = grad.new_empty((batch, ranges, count + 1, dim), dtype=torch.float32)
    arguments = inputs.of_pixels() | inputs.sizes() | settings
    arguments |= {"grad": grad, "sides": sides, "partial": partial, "ranges": ranges, "length": length}
    grid = (batch * ranges, triton.cdiv(count + 1, arguments["BLOCK_N"]), triton.cdiv(dim, tile.channels))
    return Launch(_to_queries_kernel, grid, arguments, _WARPS, tile.stages)


def _ranges(step: int, batch: int, area: int) -> tuple[int, int]:
    """How many ranges of pixels are summed apart, and how long each is; from the sizes alone, so that the sums repeat."""
    steps = triton.cdiv(area, step)
    length = max(1, triton.cdiv(steps, max(1, min(steps, _PROGRAMS // max(batch, 1))))) * step
    return triton.cdiv(area, length), length


def _closing(partial: Tensor, inputs: _Inputs) -> Launch:
    queries, scores = inputs.queries, inputs.scores
    batch, count, dim = queries.shape
    arguments = inputs.of_queries() | {"partial": partial, "N": count, "C": dim, "ranges": partial.shape[1]}
    arguments |= {"grad_queries": queries.new_empty(queries.shape), "grad_scores": scores.new_empty(scores.shape)}
    arguments |= {"grad_slope": scores.new_empty(scores.shape, dtype=torch.float32), "BLOCK_C": triton.next_power_of_2(dim)}
    return Launch(_close_kernel, (batch * count,), arguments)


def merge(queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Merged logits ``(B, P)`` float32 of pixels ``(B, C, P)``, and on which side of zero masks are, as bits; empty unless kept."""
    batch, _, area = pixels.shape
    merged = pixels.new_empty((batch, area), dtype=torch.float32)
    sides = pixels.new_empty((batch, queries.shape[1], triton.cdiv(area, 32)) if keep else (0,), dtype=torch.int32)
    _merging(architecture(queries), _Inputs(queries, pixels, scores, slope), merged, sides).run()
    return merged, sides


def unmerge(
    grad: Tensor, sides: Tensor, queries: Tensor, pixels: Tensor, scores: Tensor, slope: Tensor, *, to_pixels: bool, to_rest: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, pixels, scores, and of the slope per image and query, from the contiguous one of ``(B, P)``."""
    arch, inputs = architecture(queries), _Inputs(queries, pixels, scores, slope)
    grad_pixels = None
    if to_pixels:
        grad_pixels = pixels.new_empty(pixels.shape)
        _to_pixels(arch, grad, sides, inputs, grad_pixels).run()
    if not to_rest:
        return None, grad_pixels, None, None
    summing = _to_queries(arch, grad, sides, inputs)
    summing.run()
    closing = _closing(summing.arguments["partial"], inputs)
    closing.run()
    return closing.arguments["grad_queries"], grad_pixels, closing.arguments["grad_scores"], closing.arguments["grad_slope"]


def compilations(arch: str) -> dict[str, Launch]:
    """Launches at the paper's size, N = 100 and C = 256 at a quarter of 480 pixels, and with few queries."""
    half, full = torch.bfloat16, torch.float32
    cases = [
        (half, half, 100),
        (torch.float16, torch.float16, 100),
        (full, full, 100),
        (full, half, 100),
        (half, half, 10),
        (full, full, 10),
    ]
    found: dict[str, Launch] = {}
    for of_queries, of_pixels, count in cases:
        name = f"{of_queries}, {of_pixels}, {count} queries".replace("torch.", "")
        queries = torch.empty(32, count, 256, dtype=of_queries, device="meta")
        pixels = torch.empty(32, 256, 120 * 120, dtype=of_pixels, device="meta")
        inputs = _Inputs(queries, pixels, torch.empty(32, count, device="meta"), torch.empty((), device="meta"))
        merged, sides = torch.empty(32, 120 * 120, device="meta"), torch.empty(32, count, 450, dtype=torch.int32, device="meta")
        made = {"merge": _merging(arch, inputs, merged, sides), "to pixels": _to_pixels(arch, merged, sides, inputs, pixels)}
        made["to queries"] = _to_queries(arch, merged, sides, inputs)
        found |= {f"{kernel}, {name}": launch for kernel, launch in made.items()}
        if of_queries == of_pixels == full and arch.startswith("sm"):
            fast = {kernel: replace(launch, arguments=launch.arguments | {"PRECISION": "tf32"}) for kernel, launch in made.items()}
            found |= {f"{kernel}, tf32, {count} queries": launch for kernel, launch in fast.items()}
        found[f"close, {name}"] = _closing(made["to queries"].arguments["partial"], inputs)
        found[f"merge without gradients, {name}"] = _merging(arch, inputs, merged, sides[0, 0, :0])
    return found
