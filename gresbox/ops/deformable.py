"""Multi-scale deformable attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._deformable_corners import attend_corners, corner_gradients, value_gradient
from gresbox.ops._precision import accumulation_dtype, no_autocast
from gresbox.ops._register import Forms, define_op

__all__ = ["deformable_attention"]

ADAPTER = "deformops"
WORTH_IT = 120_000  # numbers that grid_sample reads; it is faster where they are fewer
MOST_CORNERS = 1 << 31  # where int32 ends
MOST_CHANNELS = 1024  # of the kernel, per head

_Shapes = Sequence[tuple[int, int]]


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    softmax: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Weighted sum of a few sampled points per query, head and level.

    .. math:: \sum_{l,k} A_{qhlk}\; v_{lh}(x_{qhlk})

    Paper: Zhu et al., "Deformable DETR", arXiv:2010.04159, Eq. (3), without the projections around it.
    Differs from the paper: nothing. Bilinear between pixel centres (pixel ``x W - 0.5``), zero outside the level.

    Args:
        value: Features of all levels, one after the other, row by row.
        spatial_shapes: Height and width of each level; their areas add up to ``S``.
        locations: Where to sample, xy relative to each level.
        weights: Weight of each sample; the caller's softmax over levels and points, or with ``softmax`` the logits of it.
        softmax: Whether the weights are logits; the kernel then never stores their softmax.
        backend: ``"eager"`` is ``grid_sample`` level by level, with a double backward where PyTorch's has one; ``"triton"`` the
            kernel (the registered op ``gresbox::deformable_attention``); ``"auto"`` the kernel on CUDA, and on the CPU
            ``grid_sample`` for a few queries and one weighted sum over pixels for more. ``"deformops"`` is the package of that
            name, which needs Python 3.12 or 3.13 and waits for the device. The kernel adds the values' gradient up in any order,
            and in a fixed one under ``torch.use_deterministic_algorithms(True)``; everything else is the same bits on every run.

    Shape:
        - ``value``: ``(B, S, heads, D)``; ``locations``: ``(B, Q, heads, levels, points, 2)`` xy, the level is [0, 1];
          ``weights``: ``(B, Q, heads, levels, points)``; returns ``(B, Q, heads * D)``.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.
        RuntimeError: If ``backend`` is not possible here.
        ImportError: If the package behind ``backend`` is not installed.

    Example:
        >>> import torch
        >>> value = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> deformable_attention(value, [(1, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1))
        tensor([[[2.]]])
    """
    who = "deformable_attention"
    sizes = check_shape(
        who,
        value=(value, "B S heads D"),
        locations=(locations, "B Q heads levels points 2"),
        weights=(weights, "B Q heads levels points"),
    )
    shapes = _as_pairs(who, spatial_shapes)
    if len(shapes) != sizes["levels"] or sum(height * width for height, width in shapes) != sizes["S"]:
        expected = f"{sizes['levels']} levels with {sizes['S']} pixels in all"
        raise ValueError(f"{who}: `spatial_shapes` must be {expected}, got {shapes}.")
    dtype = accumulation_dtype(who, value=value, locations=locations, weights=weights)
    refusal = _refusal(value, [], locations, weights, softmax) if backend == "triton" else None  # "auto" asks inside the op
    kernel = use_triton(who, backend, value, locations, weights, kernel=refusal or True, adapter=ADAPTER)
    if 0 in tuple(sizes.values()):  # grid_sample takes no empty map
        return value.new_zeros((sizes["B"], sizes["Q"], sizes["heads"] * sizes["D"]))
    with no_autocast(value):
        if backend == ADAPTER:
            return _adapted(value, shapes, locations, weights, softmax)
        if kernel:
            return _attend_op(value, [side for shape in shapes for side in shape], locations, weights, softmax)
        wide = value.to(dtype), shapes, locations.to(dtype), _normalized(weights.to(dtype), softmax)
        form = attend_corners if backend == "auto" and _many_samples(value, locations) else _sample_levels
        return form(*wide).flatten(2).to(value.dtype)


def _as_pairs(who: str, spatial_shapes: _Shapes) -> list[tuple[int, int]]:
    try:
        return [(int(height), int(width)) for height, width in spatial_shapes]
    except (TypeError, ValueError) as error:
        got = tuple(spatial_shapes.shape) if isinstance(spatial_shapes, Tensor) else repr(spatial_shapes)
        raise ValueError(f"{who}: `spatial_shapes` must be a (height, width) for each level, got {got}.") from error


def _normalized(weights: Tensor, softmax: bool) -> Tensor:
    return weights.flatten(-2).softmax(-1).view(weights.shape) if softmax else weights


def _sample_levels(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition: ``(B, Q, heads, D)``."""
    batch, _, heads, channels = value.shape
    areas = [height * width for height, width in shapes]
    maps = value.permute(0, 2, 3, 1).split(areas, dim=-1)  # levels of (B, heads, D, H*W)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B*heads, Q, points, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (levels, B*heads, 1, Q, points)
    out = torch.zeros((), dtype=value.dtype, device=value.device)
    for level, (shape, grid, share) in enumerate(zip(shapes, grids.unbind(0), shares.unbind(0), strict=True)):
        features = maps[level].reshape(batch * heads, channels, *shape)
        samples = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * share).sum(-1)  # (B*heads, D, Q)
    return out.view(batch, heads, channels, -1).permute(0, 3, 1, 2).contiguous()


def _many_samples(value: Tensor, locations: Tensor) -> bool:
    """Whether the sum over pixels is the faster form, where each is possible."""
    if value.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():  # sizes may be symbols; what makes it slow with few samples is compiled away
        return True
    samples = locations.numel() // 2
    copied = value.numel() // 4 if value.shape[0] > 1 else 0  # maps of several images are laid out anew for grid_sample
    return samples * (value.shape[3] - 4) + copied >= WORTH_IT and max(4 * samples, value.numel()) < MOST_CORNERS


def _shapes_of(sides: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


def _wide(value: Tensor, locations: Tensor, weights: Tensor, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype that sums are made in, weights normalised."""
    dtype = accumulation_dtype("deformable_attention", value=value, locations=locations, weights=weights)
    return value.to(dtype), locations.to(dtype), _normalized(weights.to(dtype), softmax)


def _attend(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    value_, locations, weights = _wide(value, locations, weights, softmax)
    return attend_corners(value_, _shapes_of(sides), locations, weights).flatten(2).to(value.dtype)


def _attend_backward(
    grad: Tensor, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    value_, locations_, shares = _wide(value, locations, weights, softmax)
    grad = grad.to(value_.dtype).unflatten(-1, value.shape[2:])
    grad_value, grad_locations, grad_weights = corner_gradients(grad, value_, _shapes_of(sides), locations_, shares, needs)
    if grad_weights is not None and softmax:
        grad_weights = shares * (grad_weights - (shares * grad_weights).sum((-2, -1), keepdim=True))
    return (
        None if grad_value is None else grad_value.to(value.dtype),
        None if grad_locations is None else grad_locations.to(locations.dtype),
        None if grad_weights is None else grad_weights.to(weights.dtype),
    )


def _attend_on_device(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    from gresbox.kernels.deformable import attend

    return attend(value, _shapes_of(sides), locations, weights, softmax)


def _attend_backward_on_device(
    grad: Tensor, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from gresbox.kernels.deformable import attend_backward

    repeatable = needs[0] and torch.are_deterministic_algorithms_enabled()
    wanted = {"to_value": needs[0] and not repeatable, "to_rest": needs[1] or needs[2]}
    found = attend_backward(grad, value, _shapes_of(sides), locations, weights, softmax, **wanted)
    grad_value: Any = found[0]
    if repeatable:
        value_, locations_, shares = _wide(value, locations, weights, softmax)
        by_head = grad.to(value_.dtype).unflatten(-1, value.shape[2:])
        grad_value = value_gradient(by_head, value_, _shapes_of(sides), locations_, shares).to(value.dtype)
    return grad_value, found[1], found[2]


def _refusal(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool, *rest: Any) -> str | None:
    """Why the kernel cannot take these inputs."""
    if 0 in value.shape or 0 in locations.shape:
        return "some axis has no element"
    if value.shape[3] > MOST_CHANNELS:
        return f"there are {value.shape[3]} channels per head and it takes at most {MOST_CHANNELS}"
    outputs = locations.shape[1] * value.shape[2] * value.shape[3]
    if max(outputs, *(tensor.numel() // tensor.shape[0] for tensor in (value, locations))) >= MOST_CORNERS:
        return "the values, locations or outputs of one image are more than 2^31 numbers"
    return None


def _fake(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


_attend_op = define_op(
    "deformable_attention(Tensor value, SymInt[] sides, Tensor locations, Tensor weights, bool softmax) -> Tensor",
    fake=_fake,
    forward=Forms(_attend, _attend_on_device, _refusal),
    backward=Forms(_attend_backward, _attend_backward_on_device, lambda grad, *args: _refusal(*args)),
    differentiable=("value", "locations", "weights"),
)


def _adapted(value: Tensor, shapes: _Shapes, locations: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    """By deformops, whose weights have the values' dtype."""
    from deformops.registry import msda

    sizes = torch.tensor(shapes, device=value.device)
    areas = sizes.prod(1)
    method = "softmax" if softmax else "linear"
    return msda(value, sizes, areas.cumsum(0) - areas, locations, weights.to(value.dtype), method=method)
