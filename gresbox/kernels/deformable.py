"""Kernels of ``deformable_attention``: pixels are read where they are needed, and no sample is ever stored.

A program owns a block of queries of one image and one head. It reads their locations ``(B, Q, heads, levels, points, 2)`` and
weights ``(B, Q, heads, levels, points)`` point by point, as many as there are, and the four pixels around each location from the
values ``(B, S, heads, D)``. Levels are unrolled; neither they nor the points are padded.

Forward: it writes ``(B, Q, heads, D)``.

Backward: it reads the output's gradient, too, adds to the values' gradient ``(B, S, heads, D)`` float32 and writes those of
locations and weights. With ``SOFTMAX`` the weights are logits; their probabilities are made in registers, forward and backward.

Everything but the values' gradient is the same bits on every run. That one is summed by atomic additions in any order; whoever
needs it to repeat asks the backward launch to leave it out and sums it by sorted pixels instead, as the op does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._launch import Launch, architecture, for_architecture

__all__ = ["attend", "attend_backward", "compilations"]


@triton.jit
def _axis(location, size):  # type: ignore[no-untyped-def]
    """The pixel before a location along one axis, and how far behind it the location is, 0 to 1."""
    position = location * size - 0.5
    near = tl.minimum(tl.maximum(position, -2.0), size + 1.0)  # what is further outside sees no pixel either
    pixel = tl.floor(near)
    return pixel.to(tl.int32), tl.where(position == position, near - pixel, position)  # NaN stays NaN


@triton.jit
def _pixel(row, column, height, width, real, step):  # type: ignore[no-untyped-def]
    """Where a pixel is within its level, and whether there is one."""
    inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (row * width + column) * step, inside


@triton.jit
def _read(level, at, inside, channel, known):  # type: ignore[no-untyped-def]
    """The channels of one pixel per query; zeros where there is none."""
    return tl.load(level + at[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normalizer(weights, sample, real, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest logit of each query, and the sum of what the others are to it."""
    largest = tl.load(weights + sample, mask=real, other=0.0).to(tl.float32)
    for point in range(1, COUNT):
        largest = tl.maximum(largest, tl.load(weights + sample + point, mask=real, other=0.0).to(tl.float32))
    total = tl.zeros_like(largest)
    for point in range(COUNT):
        total += tl.exp(tl.load(weights + sample + point, mask=real, other=0.0).to(tl.float32) - largest)
    return largest, total


@triton.jit(do_not_specialize=["S", "Q", "blocks"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    value,
    locations,
    weights,
    out,
    heights,
    widths,
    S,
    Q,
    heads,
    blocks,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    query = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < Q
    head = (program // blocks) % heads
    image = (program // blocks // heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    known = channel < CHANNELS
    # Within an image offsets fit into 32 bits.
    lines = image * Q * heads
    locations += lines * (2 * LEVELS * POINTS)
    weights += lines * (LEVELS * POINTS)
    out += lines * CHANNELS
    row = query * heads + head
    sample = row * (LEVELS * POINTS)
    step = heads * CHANNELS
    level = value + image * S * step + head * CHANNELS
    largest = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if SOFTMAX:
        largest, total = _normalizer(weights, sample, real, LEVELS * POINTS)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for index in tl.static_range(LEVELS):
        height = heights[index] // 2
        width = widths[index] // 2
        for point in range(POINTS):
            at = sample + index * POINTS + point
            weight = tl.load(weights + at, mask=real, other=0.0).to(tl.float32)
            if SOFTMAX:
                weight = tl.exp(weight - largest) / total
            left, right_share = _axis(tl.load(locations + 2 * at, mask=real, other=0.0).to(tl.float32), width)
            top, low_share = _axis(tl.load(locations + 2 * at + 1, mask=real, other=0.0).to(tl.float32), height)
            at00, inside00 = _pixel(top, left, height, width, real, step)
            at01, inside01 = _pixel(top, left + 1, height, width, real, step)
            at10, inside10 = _pixel(top + 1, left, height, width, real, step)
            at11, inside11 = _pixel(top + 1, left + 1, height, width, real, step)
            v00 = _read(level, at00, inside00, channel, known)
            v01 = _read(level, at01, inside01, channel, known)
            v10 = _read(level, at10, inside10, channel, known)
            v11 = _read(level, at11, inside11, channel, known)
            # A ((1 - y) ((1 - x) v00 + x v01) + y ((1 - x) v10 + x v11))
            upper = v00 + right_share[:, None] * (v01 - v00)
            lower = v10 + right_share[:, None] * (v11 - v10)
            result += weight[:, None] * (upper + low_share[:, None] * (lower - upper))
        level += height * width * step
    to = out + row[:, None] * CHANNELS + channel[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=real[:, None] & known[None, :])


@triton.jit(do_not_specialize=["S", "Q", "blocks"])
def _attend_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    value,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    heights,
    widths,
    S,
    Q,
    heads,
    blocks,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TO_VALUE: tl.constexpr,
    TO_REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    query = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < Q
    head = (program // blocks) % heads
    image = (program // blocks // heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    known = channel < CHANNELS
    here = real[:, None] & known[None, :]
    # Within an image offsets fit into 32 bits.
    lines = image * Q * heads
    locations += lines * (2 * LEVELS * POINTS)
    weights += lines * (LEVELS * POINTS)
    grad_locations += lines * (2 * LEVELS * POINTS)
    grad_weights += lines * (LEVELS * POINTS)
    grad += lines * CHANNELS
    row = query * heads + head
    sample = row * (LEVELS * POINTS)
    step = heads * CHANNELS
    first = image * S * step + head * CHANNELS
    gradient = tl.load(grad + row[:, None] * CHANNELS + channel[None, :], mask=here, other=0.0).to(tl.float32)
    largest = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    kind = tl.arange(0, BLOCK_K)
    seen = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)  # g . v(x) of each point
    if SOFTMAX:
        largest, total = _normalizer(weights, sample, real, LEVELS * POINTS)
    for index in tl.static_range(LEVELS):
        height = heights[index] // 2
        width = widths[index] // 2
        level = value + first
        to_level = grad_value + first
        for point in range(POINTS):
            at = sample + index * POINTS + point
            weight = tl.load(weights + at, mask=real, other=0.0).to(tl.float32)
            if SOFTMAX:
                weight = tl.exp(weight - largest) / total
            left, right_share = _axis(tl.load(locations + 2 * at, mask=real, other=0.0).to(tl.float32), width)
            top, low_share = _axis(tl.load(locations + 2 * at + 1, mask=real, other=0.0).to(tl.float32), height)
            at00, inside00 = _pixel(top, left, height, width, real, step)
            at01, inside01 = _pixel(top, left + 1, height, width, real, step)
            at10, inside10 = _pixel(top + 1, left, height, width, real, step)
            at11, inside11 = _pixel(top + 1, left + 1, height, width, real, step)
            if TO_REST:
                v00 = _read(level, at00, inside00, channel, known)
                v01 = _read(level, at01, inside01, channel, known)
                v10 = _read(level, at10, inside10, channel, known)
                v11 = _read(level, at11, inside11, channel, known)
                # dA = g . v(x); dx = A W g . ((1 - y) (v01 - v00) + y (v11 - v10)); dy = A H g . (lower - upper)
                above = v01 - v00
                below = v11 - v10
                upper = v00 + right_share[:, None] * above
                lower = v10 + right_share[:, None] * below
                down = lower - upper
                to_weight = tl.sum(gradient * (upper + low_share[:, None] * down), axis=1)
                to_x = tl.sum(gradient * (above + low_share[:, None] * (below - above)), axis=1) * weight * width
                to_y = tl.sum(gradient * down, axis=1) * weight * height
                if SOFTMAX:
                    seen = tl.where(kind[None, :] == index * POINTS + point, to_weight[:, None], seen)
                else:
                    tl.store(grad_weights + at, to_weight.to(grad_weights.dtype.element_ty), mask=real)
                tl.store(grad_locations + 2 * at, to_x.to(grad_locations.dtype.element_ty), mask=real)
                tl.store(grad_locations + 2 * at + 1, to_y.to(grad_locations.dtype.element_ty), mask=real)
            if TO_VALUE:
                # dv += A (share of the pixel) g
                upper_part = (weight * (1.0 - low_share))[:, None] * gradient
                lower_part = (weight * low_share)[:, None] * gradient
                to_left = (1.0 - right_share)[:, None]
                to_right = right_share[:, None]
                _add(to_level, at00, inside00, channel, known, upper_part * to_left)
                _add(to_level, at01, inside01, channel, known, upper_part * to_right)
                _add(to_level, at10, inside10, channel, known, lower_part * to_left)
                _add(to_level, at11, inside11, channel, known, lower_part * to_right)
        first += height * width * step
    if SOFTMAX and TO_REST:
        each = sample[:, None] + kind[None, :]
        exists = real[:, None] & (kind < LEVELS * POINTS)[None, :]
        logit = tl.load(weights + each, mask=exists, other=float("-inf")).to(tl.float32)
        probability = tl.exp(logit - largest[:, None]) / total[:, None]
        # dlogit = p (dp - sum_j p_j dp_j)
        mean = tl.sum(tl.where(exists, probability * seen, 0.0), axis=1)
        to_logit = probability * (seen - mean[:, None])
        tl.store(grad_weights + each, to_logit.to(grad_weights.dtype.element_ty), mask=exists)


@triton.jit
def _add(level, at, inside, channel, known, amount):  # type: ignore[no-untyped-def]
    """Add to the channels of one pixel per query."""
    tl.atomic_add(level + at[:, None] + channel[None, :], amount, mask=inside[:, None] & known[None, :], sem="relaxed")


# Channels times queries of one warp, by bytes per number: a thread reads, or adds, 16 bytes of a pixel at once.
_ELEMENTS = {"sm_80": {2: 256, 4: 128}, "sm_90": {2: 256, 4: 128}, "gfx942": {2: 512, 4: 256}}
_WARPS = 4
_SMALL = 1 << 19  # outputs; fewer are shared among programs of one warp, so that there are enough of them


def _tile(arch: str, numbers: Tensor, value: Tensor, locations: Tensor) -> tuple[dict[str, int], int]:
    """Queries and channels of a program, and its warps, for pixels of the dtype of ``numbers``."""
    block_d = triton.next_power_of_2(value.shape[3])
    warps = _WARPS if locations.shape[0] * locations.shape[1] * value.shape[2] * block_d >= _SMALL else 1
    elements = for_architecture(_ELEMENTS, arch)[numbers.element_size()] * warps
    return {"BLOCK_Q": max(1, elements // block_d), "BLOCK_D": block_d}, warps


def _arguments(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, softmax: bool, blocks: dict[str, int]
) -> dict[str, Any]:
    """What both launches say of the inputs."""
    _, queries, heads, levels, points, _ = locations.shape
    return {
        "value": value,
        "locations": locations,
        "weights": weights,
        # As odd numbers: Triton compiles anew for numbers that 16 divides, and images come in many sizes.
        "heights": tuple(2 * height + 1 for height, _ in shapes),
        "widths": tuple(2 * width + 1 for _, width in shapes),
        "S": value.shape[1],
        "Q": queries,
        "heads": heads,
        "blocks": triton.cdiv(queries, blocks["BLOCK_Q"]),
        "CHANNELS": value.shape[3],
        "LEVELS": levels,
        "POINTS": points,
        "SOFTMAX": softmax,
        **blocks,
    }


def _attending(arch: str, out: Tensor, value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, softmax: bool) -> Launch:
    blocks, warps = _tile(arch, value, value, locations)
    arguments = _arguments(value, shapes, locations, weights, softmax, blocks) | {"out": out}
    return Launch(_attend_kernel, (value.shape[0] * value.shape[2] * arguments["blocks"],), arguments, warps)


def _going_back(
    arch: str,
    grads: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    value: Tensor,
    shapes: Any,
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
) -> Launch:
    """``grads``: of the output, and those to be written, of values, locations and weights; locations and weights go together."""
    grad, grad_value, grad_locations, grad_weights = grads
    blocks, warps = _tile(arch, value if grad_value is None else grad_value, value, locations)
    arguments = _arguments(value, shapes, locations, weights, softmax, blocks) | {
        "grad": grad,
        "grad_value": grad if grad_value is None else grad_value,
        "grad_locations": grad if grad_locations is None else grad_locations,
        "grad_weights": grad if grad_weights is None else grad_weights,
        "TO_VALUE": grad_value is not None,
        "TO_REST": grad_locations is not None,
        "BLOCK_K": triton.next_power_of_2(locations.shape[3] * locations.shape[4]) if softmax else 1,
    }
    return Launch(_attend_backward_kernel, (value.shape[0] * value.shape[2] * arguments["blocks"],), arguments, warps)


def attend(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    """``(B, Q, heads * D)`` in the values' dtype."""
    batch, _, heads, channels = value.shape
    out = value.new_empty((batch, locations.shape[1], heads * channels))
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    _attending(architecture(value), out, value, shapes, locations, weights, softmax).run()
    return out


def attend_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    *,
    to_value: bool,
    to_rest: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of values, locations and weights."""
    grad, value, locations, weights = grad.contiguous(), value.contiguous(), locations.contiguous(), weights.contiguous()
    grad_value = value.new_zeros(value.shape, dtype=torch.float32) if to_value else None
    grad_locations = locations.new_empty(locations.shape) if to_rest else None
    grad_weights = weights.new_empty(weights.shape) if to_rest else None
    if to_value or to_rest:
        grads = (grad, grad_value, grad_locations, grad_weights)
        _going_back(architecture(value), grads, value, shapes, locations, weights, softmax).run()
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights


def compilations(arch: str) -> dict[str, Launch]:
    """Launches of a pixel decoder at 480 pixels (4,725 queries) and of a decoder's 100 queries, weights as logits and given."""
    half, full, found = torch.bfloat16, torch.float32, {}
    cases = [(dtype, batch, queries, True) for dtype in (half, torch.float16, full) for batch, queries in ((32, 4725), (1, 100))]
    for dtype, batch, queries, softmax in [*cases, (half, 32, 4725, False)]:
        name = f"{str(dtype).removeprefix('torch.')}, {queries} queries{'' if softmax else ', weights given'}"
        value, out = (torch.empty(batch, count, 8, 32, dtype=dtype, device="meta") for count in (4725, queries))
        locations = torch.empty(batch, queries, 8, 3, 4, 2, device="meta")
        weights, wide = locations[..., 0], torch.empty(value.shape, dtype=full, device="meta")
        inputs = (value, [(15, 15), (30, 30), (60, 60)], locations, weights, softmax)
        found[f"forward, {name}"] = _attending(arch, out, *inputs)
        found[f"backward, {name}"] = _going_back(arch, (out, wide, locations, weights), *inputs)
        if queries > 100 and softmax:
            found[f"backward without values, {name}"] = _going_back(arch, (out, None, locations, weights), *inputs)
            found[f"backward to values only, {name}"] = _going_back(arch, (out, wide, None, None), *inputs)
    return found
