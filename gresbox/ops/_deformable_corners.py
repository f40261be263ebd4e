"""Deformable attention as one weighted sum over rows of a table: the four pixels around each location, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops._first_order import first_order

__all__ = ["attend_corners", "corner_gradients", "value_gradient"]

_Shapes = Sequence[tuple[int, int]]
_FAR = 1 << 24  # no location is that close to what is this far away
_CHUNK = 1 << 19  # numbers that are gathered at a time where gradients are made; they fit into a core's cache


class _Axis(NamedTuple):
    """One axis of the two pixels that may see a location: the first one and the one after it, both inside the level.

    Args:
        first: The first pixel; where the location is outside, the nearest one that has another after it.
        behind: How far behind it the location is, in pixels; outside [0, 1) beyond the border.
        shares: Bilinear weight of the first and of the second pixel, zero where the location is a pixel or more away.
    """

    first: Tensor
    behind: Tensor
    shares: tuple[Tensor, Tensor]


class _Corners(NamedTuple):
    """All samples, one line per query and head, one column per level and point.

    Args:
        rows: Rows of the table of pixels, four times as many columns: upper left, upper right, lower left, lower right.
        x: Along the width.
        y: Along the height.
        sides: Width and height of each sample's level, ``(2, columns)``.
        wide: 1 where that side has a second pixel, else 0.
    """

    rows: Tensor
    x: _Axis
    y: _Axis
    sides: Tensor
    wide: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        """Weight of each corner, in the order of the rows."""
        top, bottom = self.y.shares[0] * weights, self.y.shares[1] * weights
        left, right = self.x.shares
        return torch.cat([top * left, top * right, bottom * left, bottom * right], 1)


def attend_corners(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """``(B, Q, heads, D)``; all tensors have one dtype, float32 or float64. Fewer than 2^31 corners."""
    if torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad or weights.requires_grad):
        return _Attend.apply(value, locations, weights, tuple(shapes))
    return _attend(value, locations, weights, shapes)


class _Attend(torch.autograd.Function):
    """Saves its inputs only; the backward pass finds the corners again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: _Shapes) -> Tensor:
        return _attend(value, locations, weights, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, locations, weights, ctx.shapes = inputs
        ctx.save_for_backward(value, locations, weights)

    @staticmethod
    @first_order("deformable_attention")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = saved
        return *corner_gradients(grad, value, ctx.shapes, locations, weights, ctx.needs_input_grad[:3]), None


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shapes: _Shapes) -> Tensor:
    found = _find_corners(value, shapes, locations)
    shares = found.weighted(weights.reshape(-1, found.sides.shape[1]))
    out = F.embedding_bag(found.rows, _table(value), mode="sum", per_sample_weights=shares)
    return out.view(*locations.shape[:3], -1)


def corner_gradients(
    grad: Tensor, value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of values, locations and weights from the one of ``(B, Q, heads, D)``; None where not needed."""
    found = _find_corners(value, shapes, locations)
    factor = weights.reshape(-1, found.sides.shape[1])
    grad = grad.reshape(-1, grad.shape[-1])
    grad_value = grad_locations = grad_weights = None
    if needs[0]:
        grad_value = _sum_by_row(found.rows, found.weighted(factor), grad, _table(value).shape[0]).view(value.shape)
    if needs[1] or needs[2]:
        upper_left, upper_right, lower_left, lower_right = _dots(_table(value), found.rows, grad).chunk(4, 1)
        left, right = found.x.shares
        upper, lower = left * upper_left + right * upper_right, left * lower_left + right * lower_right
        grad_weights = (found.y.shares[0] * upper + found.y.shares[1] * lower).view(weights.shape)
    if needs[1]:
        top, bottom = found.y.shares
        first, second = _slopes(found.x.behind, found.wide[0])
        along_x = first * (top * upper_left + bottom * lower_left) + second * (top * upper_right + bottom * lower_right)
        first, second = _slopes(found.y.behind, found.wide[1])
        along_y = first * upper + second * lower
        along = torch.stack([along_x * factor * found.sides[0], along_y * factor * found.sides[1]], -1)
        grad_locations = along.view(locations.shape)
    return grad_value, grad_locations, grad_weights if needs[2] else None


def value_gradient(grad: Tensor, value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The values' gradient alone, summed in a fixed order on any device."""
    found = corner_gradients(grad, value, shapes, locations, weights, (True, False, False))[0]
    assert found is not None
    return found


def _table(value: Tensor) -> Tensor:
    """One row per image, pixel and head."""
    return value.reshape(-1, value.shape[3])


def _find_corners(value: Tensor, shapes: _Shapes, locations: Tensor) -> _Corners:
    batch, pixels, heads, _ = value.shape
    points, device = locations.shape[4], locations.device
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    sides = _columns([[width for _, width in shapes], [height for height, _ in shapes]], points, locations.dtype, device)
    steps = [[int(width > 1) for _, width in shapes], [int(height > 1) * width for height, width in shapes]]
    across, down, width, start = _columns(
        [[heads * step for step in steps[0]], [heads * step for step in steps[1]], [w for _, w in shapes], starts],
        points,
        torch.int32,
        device,
    )
    wide = (sides > 1).to(sides.dtype)
    samples = locations.reshape(-1, sides.shape[1], 2)
    x, y = (_along(samples[..., axis], sides[axis], wide[axis]) for axis in (0, 1))
    line = (y.first * width + x.first + start).view(*locations.shape[:3], -1)
    head = torch.arange(heads, dtype=torch.int32, device=device)
    image = torch.arange(0, batch * pixels * heads, pixels * heads, dtype=torch.int32, device=device)
    first = (line * heads + (image[:, None] + head)[:, None, :, None]).view(-1, sides.shape[1])
    below = first + down
    return _Corners(torch.cat([first, first + across, below, below + across], 1), x, y, sides, wide)


def _columns(rows: list[list[int]], points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number per level, repeated for its points."""
    if device.type == "cuda":  # a copy from the host would wait for the device, and a captured graph cannot hold it
        made = [[torch.full((points,), number, dtype=dtype, device=device) for number in row] for row in rows]
        return torch.stack([torch.cat(row) for row in made])
    return torch.tensor([[number for number in row for _ in range(points)] for row in rows], dtype=dtype, device=device)


def _along(location: Tensor, side: Tensor, wide: Tensor) -> _Axis:
    # Beyond the clamp nothing is seen, and what is left fits into an int32.
    position = (location * side - 0.5).clamp(-4, _FAR // 4)
    # Whatever NaN becomes as an integer is a pixel after the two bounds; its shares stay NaN.
    first = position.floor().to(torch.int32).clamp(min=0).minimum((side - 2).clamp(min=0).to(torch.int32))
    behind = position - first
    # A side of one pixel has no second one; its place is where no location is.
    second = behind - torch.where(wide > 0, 1, _FAR)
    return _Axis(first, behind, (F.relu(1 - behind.abs()), F.relu(1 - second.abs())))


def _slopes(behind: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of both shares; on a pixel's centre those towards the next one."""
    cell = behind.floor()
    before, between, after = ((cell == place).to(behind.dtype) for place in (-1, 0, 1))
    return before - between, (between - after) * wide


def _dots(table: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """``grad . table[rows]`` of each line of rows."""
    if torch.compiler.is_compiling():  # nothing is gathered: the sum is made on the way
        return (table[rows] * grad[:, None]).sum(-1)
    lines = max(1, _CHUNK // (rows.shape[1] * table.shape[1]))
    found = []
    for row, part in zip(rows.split(lines), grad.split(lines), strict=True):
        gathered = table.index_select(0, row.reshape(-1)).view(*row.shape, -1)
        found.append((part[:, None] @ gathered.mT)[:, 0])
    return torch.cat(found)


def _sum_by_row(rows: Tensor, shares: Tensor, grad: Tensor, count: int) -> Tensor:
    """Rows of the table's gradient: corners sorted by row, then one weighted sum of the lines of ``grad`` per row."""
    ordered, order = rows.view(-1).sort(stable=True)
    if rows.is_cuda:  # where algorithms must be deterministic, index_add waits for the device
        bags = torch.searchsorted(ordered, torch.arange(count, dtype=ordered.dtype, device=rows.device))
    else:
        ones = torch.ones((), dtype=torch.int32, device=rows.device).expand(ordered.shape)
        ends = torch.zeros(count, dtype=torch.int32, device=rows.device).index_add(0, ordered, ones).cumsum(0)
        bags = F.pad(ends[:-1], (1, 0))
    lines = order // rows.shape[1]
    return F.embedding_bag(lines, grad, bags, mode="sum", per_sample_weights=shares.view(-1).index_select(0, order))
