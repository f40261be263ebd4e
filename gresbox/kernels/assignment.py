"""Kernel of ``assign``: the whole batch of linear assignment problems in one launch.

A program owns one problem. It reads its costs ``(N, M)`` and its number of real columns, and writes the row of each column ``(M,)``
and whether it met NaN or -inf. It adds one element of the smaller side after another along a shortest augmenting path (Crouse, "On
implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016; SciPy solves the same problems in the same way), with the
larger side in the lanes of one warp or few, in float64 as SciPy does. Costs that are not finite are replaced as the op documents,
and every loop has a bound, so no cost can keep it from ending. The result is the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._launch import Launch

__all__ = ["compilations", "match"]


@triton.jit
def _least(values):  # type: ignore[no-untyped-def]
    """Smallest of some float64, by two minima of integers, which are one instruction each within a warp."""
    bits = values.to(tl.int64, bitcast=True)
    order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)  # integers in the order of the floating-point numbers
    high = (order >> 32).to(tl.int32)
    top = tl.min(high, axis=0)
    low = ((order & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    rest = tl.min(tl.where(high == top, low, 0x7FFFFFFF), axis=0)
    found = (top.to(tl.int64) << 32) | (rest.to(tl.int64) + 0x80000000)
    return (found ^ ((found >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _value_at(values, here):  # type: ignore[no-untyped-def]
    """The one float64 that ``here`` marks, by two sums of integers; 0 where it marks none."""
    bits = values.to(tl.int64, bitcast=True)
    high = tl.sum(tl.where(here, (bits >> 32).to(tl.int32), 0), axis=0)
    low = tl.sum(tl.where(here, ((bits & 0xFFFFFFFF) - 0x80000000).to(tl.int32), 0), axis=0)
    some = tl.max(here.to(tl.int32), axis=0) > 0
    found = (high.to(tl.int64) << 32) | (low.to(tl.int64) + 0x80000000)
    return tl.where(some, found, 0).to(tl.float64, bitcast=True)


@triton.jit
def _look_through(lane_at, real, short_step, size, TILE: tl.constexpr, BLOCK_LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """Smallest and largest finite cost, and the worst that is met: 0 all finite, 1 some +inf, 2 some NaN or -inf."""
    smallest = tl.full([TILE, BLOCK_LONG], float("inf"), tl.float32)
    largest = tl.full([TILE, BLOCK_LONG], float("-inf"), tl.float32)
    odd = tl.zeros([TILE, BLOCK_LONG], tl.int32)
    for first in range(0, size, TILE):
        each = first + tl.arange(0, TILE)
        known = (each < size)[:, None] & real[None, :]
        value = tl.load(lane_at[None, :] + each[:, None] * short_step, mask=known, other=0.0).to(tl.float32)
        finite = tl.abs(value) < float("inf")
        smallest = tl.where(known & finite, tl.minimum(smallest, value), smallest)
        largest = tl.where(known & finite, tl.maximum(largest, value), largest)
        odd = tl.maximum(odd, tl.where(finite, 0, tl.where(value == float("inf"), 1, 2)))
    low = tl.min(tl.min(smallest, axis=1), axis=0)
    high = tl.max(tl.max(largest, axis=1), axis=0)
    low = tl.where(low < float("inf"), low, 0.0).to(tl.float64)
    high = tl.where(high > float("-inf"), high, 0.0).to(tl.float64)
    return low, high, tl.max(tl.max(odd, axis=1), axis=0)


@triton.jit
def _prices(at, known, low, scale, more, worst):  # type: ignore[no-untyped-def]
    """Costs in float64. Where some are not finite the others are in units of their range, and those cost more than they can."""
    value = tl.load(at, mask=known, other=0.0).to(tl.float32)
    price = value.to(tl.float64)
    if worst > 0:
        fine = tl.abs(value) < float("inf")
        price = tl.where(fine, (tl.where(fine, price, 0.0) - low) / scale, more)
    return price


@triton.jit
def _hand_on(sink, before, owner, partner, lane, element, current):  # type: ignore[no-untyped-def]
    """Give each lane of the path to the element before it, from its end to the new element."""
    step = 0
    while (sink >= 0) & (step <= current):
        giver = tl.sum(tl.where(lane == sink, before, 0), axis=0)
        last = tl.sum(tl.where(element == giver, partner, 0), axis=0)
        owner = tl.where(lane == sink, giver, owner)
        partner = tl.where(element == giver, sink, partner)
        sink = last  # the new element has no partner yet: -1 ends the path
        step += 1
    return owner, partner


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    lane_at,
    width,
    size,
    short_step,
    low,
    scale,
    more,
    worst,
    short_dual,
    long_dual,
    owner,
    lane,
    element,
    current,
    BLOCK_LONG: tl.constexpr,
):
    """Shortest augmenting path from the element ``current`` to a lane without owner, and the duals that go with it."""
    real = lane < width
    shortest = tl.full([BLOCK_LONG], float("inf"), tl.float64)
    before = tl.full([BLOCK_LONG], -1, tl.int32)
    scanned = lane < 0
    entered = tl.where(element == current, 0.0, float("inf")).to(tl.float64)
    distance = _value_at(entered, element == current)
    dual = _value_at(short_dual, element == current)
    at = current
    sink = -1
    step = 0
    while (sink < 0) & (step <= current):
        known = lane < tl.where(at < size, width, 0)
        reach = distance + _prices(lane_at + at * short_step, known, low, scale, more, worst) - dual - long_dual
        free = real & (scanned == 0)
        better = free & (reach < shortest)
        shortest = tl.where(better, reach, shortest)
        before = tl.where(better, at, before)
        distance = _least(tl.where(free, shortest, float("inf")))
        # Of several nearest lanes one without owner, else the first; the owner travels in the low bits.
        key = tl.where(owner < 0, lane << 15, (1 << 30) + (lane << 15) + owner)
        key = tl.min(tl.where(free & (shortest == distance), key, 0x7FFFFFFF), axis=0)
        nearest = (key >> 15) & 0x7FFF
        scanned = scanned | (lane == nearest)
        ends = key < (1 << 30)
        sink = tl.where(ends, nearest, sink)
        at = tl.where(ends, at, key & 0x7FFF)
        entered = tl.where((element == at) & (ends == 0), distance, entered)
        dual = _value_at(short_dual, element == at)
        step += 1
    if sink >= 0:
        short_dual = tl.where(entered < float("inf"), short_dual + (distance - entered), short_dual)
        long_dual = tl.where(scanned, long_dual - (distance - shortest), long_dual)
    return sink, before, short_dual, long_dual


@triton.jit
def _match_kernel(  # type: ignore[no-untyped-def]
    cost,
    counts,
    matched,
    wrong,
    N,
    M,
    cost_problem,
    cost_row,
    cost_column,
    COUNTED: tl.constexpr,
    BLOCK_SHORT: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
    TILE: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    count = M
    if COUNTED:
        count = tl.minimum(tl.maximum(tl.load(counts + problem, mask=problem >= 0), 0), M).to(tl.int32)
    # Elements of the short side are added one by one; the long side lies in the lanes.
    flipped = count > N
    size = tl.minimum(count, N)
    width = tl.maximum(count, N)
    short_step = tl.where(flipped, cost_row, cost_column).to(tl.int64)
    long_step = tl.where(flipped, cost_column, cost_row).to(tl.int64)
    lane = tl.arange(0, BLOCK_LONG)
    element = tl.arange(0, BLOCK_SHORT)
    lane_at = cost + problem * cost_problem + lane * long_step
    low, high, worst = _look_through(lane_at, lane < width, short_step, size, TILE, BLOCK_LONG)
    tl.store(wrong + problem, (worst == 2).to(tl.int8), mask=problem >= 0)
    scale = tl.maximum(high - low, 1e-300)
    more = 2.0 * (size + 1).to(tl.float64)

    short_dual = tl.zeros([BLOCK_SHORT], tl.float64)
    long_dual = tl.zeros([BLOCK_LONG], tl.float64)
    partner = tl.full([BLOCK_SHORT], -1, tl.int32)  # lane of each element
    owner = tl.full([BLOCK_LONG], -1, tl.int32)  # element of each lane
    for current in range(size):
        sink, before, short_dual, long_dual = _search(
            lane_at,
            width,
            size,
            short_step,
            low,
            scale,
            more,
            worst,
            short_dual,
            long_dual,
            owner,
            lane,
            element,
            current,
            BLOCK_LONG,
        )
        owner, partner = _hand_on(sink, before, owner, partner, lane, element, current)

    row_of = matched + problem * M
    tl.store(row_of + element, partner.to(tl.int64), mask=element < tl.where(flipped, 0, count))
    rest = tl.where(flipped, 0, count)
    tl.store(row_of + lane, tl.where(lane < count, owner, -1).to(tl.int64), mask=(lane < M) & (lane >= rest))


def _prepare(cost: Tensor, counts: Tensor | None) -> tuple[Launch, Tensor, Tensor]:
    """The launch, the rows and the flags that it writes."""
    batch, rows, columns = cost.shape
    matched = cost.new_empty((batch, columns), dtype=torch.int64)
    wrong = cost.new_empty((batch,), dtype=torch.int8)
    strides = dict(zip(("cost_problem", "cost_row", "cost_column"), cost.stride(), strict=True))
    long = triton.next_power_of_2(max(rows, columns, 32))
    arguments = {
        "cost": cost,
        "counts": matched if counts is None else counts,
        "matched": matched,
        "wrong": wrong,
        "N": rows,
        "M": columns,
        **strides,
        "COUNTED": counts is not None,
        "BLOCK_SHORT": triton.next_power_of_2(max(min(rows, columns), 2)),
        "BLOCK_LONG": long,
        "TILE": 2 if long <= 256 else 1,
    }
    return Launch(_match_kernel, (batch,), arguments, warps=1 if long <= 256 else 4, stages=1, fp_fusion=False), matched, wrong


def match(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The row of each column ``(B, M)`` int64, and which problems hold NaN or -inf, ``(B,)`` int8. Counts are clamped to [0, M]."""
    launch, matched, wrong = _prepare(cost, counts)
    launch.run()
    return matched, wrong


def compilations(arch: str) -> dict[str, Launch]:
    """100 queries and 10 targets, in each dtype, with and without counts; then larger problems."""
    counts = torch.empty(320, dtype=torch.int64, device="meta")
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cost = torch.empty((320, 100, 10), dtype=dtype, device="meta")
        found[f"100x10 {str(dtype).removeprefix('torch.')}"] = _prepare(cost, counts)[0]
    found["100x10 float32, all real"] = _prepare(torch.empty((320, 100, 10), device="meta"), None)[0]
    for rows, columns in ((900, 20), (300, 100), (1024, 128)):
        found[f"{rows}x{columns} float32"] = _prepare(torch.empty((32, rows, columns), device="meta"), counts[:32])[0]
    return found
