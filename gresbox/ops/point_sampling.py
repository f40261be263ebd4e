"""Reading maps at points, and choosing points where masks are uncertain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_count, check_range, check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["point_sample", "uncertain_points"]

_MANY_MAPS = 64  # from here on a CPU reads maps as rows of pixels, with gradients map by map: grid_sample jumps between channels


def point_sample(masks: Tensor, points: Tensor) -> Tensor:
    """Read maps at points: bilinear between pixel centres, zero outside.

    Paper: Kirillov et al., "PointRend", arXiv:1912.08193, Sec. 3.1. Differs from the paper: nothing.

    Args:
        masks: Maps to read; bool maps count as 0 and 1, and only what is read of them becomes a number.
        points: Where, with (0, 0) the upper left corner of the upper left pixel and (1, 1) the lower right corner of the last.

    Shape:
        - ``masks``: ``(B, N, H, W)``; ``points``: ``(B, K, 2)`` xy; returns ``(B, N, K)``, which need not be contiguous.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> point_sample(torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[0.25, 0.5], [0.5, 0.5]]]))
        tensor([[[0., 2.]]])
    """
    sizes = check_shape("point_sample", masks=(masks, "B N H W"), points=(points, "B K 2"))
    floating = masks.is_floating_point()
    named = {"masks": masks, "points": points} if floating else {"points": points}
    dtype = accumulation_dtype("point_sample", **named)
    given = masks.dtype if floating else torch.float32
    if 0 in tuple(sizes.values()):  # grid_sample takes no empty map
        return points.new_zeros((sizes["B"], sizes["N"], sizes["K"]), dtype=given)
    with no_autocast(masks):
        spots = points.to(dtype)
        if not floating:
            return _read_at_corners(masks, spots).to(given)
        values, many = masks.to(dtype), masks.device.type == "cpu" and sizes["N"] >= _MANY_MAPS
        learns = torch.is_grad_enabled() and (masks.requires_grad or points.requires_grad)
        if many and not learns:
            return _sum_of_corners(values, spots).to(given)
        grid = (2 * spots - 1)[:, :, None]  # (B, K, 1, 2)
        if many:  # the same numbers; the CPU's kernel jumps from channel to channel at every point
            grid = grid[:, None].expand(-1, sizes["N"], -1, -1, -1).flatten(0, 1)
            values = values.flatten(0, 1)[:, None]
        values = F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if many:
            values = values[:, 0].unflatten(0, (sizes["B"], sizes["N"]))
    return values[..., 0].to(given)


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each point and their weights, ``(B, K, 4)`` each; weight 0 outside."""
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    places, weights = [], []
    for row, by_row in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, by_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            places.append(_nearest(row, height) * width + _nearest(column, width))
            weights.append(torch.where(inside, by_row * by_column, 0))
    return torch.stack(places, -1), torch.stack(weights, -1)


def _nearest(place: Tensor, size: int) -> Tensor:
    """Rows or columns as indices, what is outside at the border: a weight of 0 hides no infinite value far away."""
    return place.nan_to_num(0.0).clamp(0, size - 1).long()


def _read_at_corners(masks: Tensor, points: Tensor) -> Tensor:
    """Of maps that are not floating-point, ``(B, N, K)`` in the points' dtype: nothing but what is read becomes a number."""
    place, weight = _corners(points, *masks.shape[2:])
    read = masks.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, masks.shape[1], -1))
    return (read.unflatten(2, (-1, 4)) * weight[:, None]).sum(-1)


def _sum_of_corners(maps: Tensor, points: Tensor) -> Tensor:
    """Of many maps without gradient: an image's values are laid out pixel by pixel, and a point is a weighted sum of four rows."""
    batch, count, height, width = maps.shape
    place, weight = _corners(points, height, width)
    found, pixels = maps.new_empty((batch, points.shape[1], count)), maps.new_empty((height, width, count))
    for image, spots, shares, out in zip(maps, place, weight, found, strict=True):
        pixels.copy_(image.permute(1, 2, 0))
        out.copy_(F.embedding_bag(spots, pixels.flatten(0, 1), per_sample_weights=shares, mode="sum"))
    return found.mT


def uncertain_points(
    mask_logits: Tensor | Callable[[Tensor], Tensor],
    num_points: int = 12544,
    *,
    oversample: float = 3.0,
    importance: float = 0.75,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose points for a mask loss: of many random ones those with the smallest ``|logit|``, and some fresh random ones.

    Paper: Kirillov et al., "PointRend", arXiv:1912.08193, Sec. 3.1; the defaults are those of Cheng et al., arXiv:2112.01527.
    Differs from the paper: nothing. No gradient flows.

    Args:
        mask_logits: The masks; or a function from points ``(K, R, 2)`` to their logits ``(K, R)``, for masks that are not built.
        num_points: Points per mask.
        oversample: Candidates per chosen point.
        importance: Fraction of the points that are chosen by uncertainty.
        noise: Uniform random points: first ``int(num_points * oversample)`` candidates, then
            ``num_points - int(num_points * importance)`` fresh ones. Default: drawn. A function as ``mask_logits`` needs it.
        generator: Source of the drawn noise.

    Shape:
        - ``mask_logits``: ``(K, h, w)``; ``noise``: ``(K, R, 2)`` in [0, 1]; returns ``(K, num_points, 2)`` xy in [0, 1].

    Raises:
        TypeError: If ``num_points`` is no whole number.
        ValueError: If an argument is out of its range, a shape does not fit, or a function comes without ``noise``.

    Example:
        >>> import torch
        >>> uncertain_points(torch.randn(3, 8, 8), 16, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 16, 2])
    """
    who = "uncertain_points"
    check_count(who, "num_points", num_points)
    check_range(who, "oversample", oversample, low=1)
    check_range(who, "importance", importance, low=0, high=1)
    candidates, chosen = int(num_points * oversample), int(num_points * importance)
    drawn = candidates + num_points - chosen
    if noise is None:
        if not isinstance(mask_logits, Tensor):
            raise ValueError(f"{who}: `noise` must be given with a function as `mask_logits`, got None.")
        noise = torch.rand((mask_logits.shape[0], drawn, 2), device=mask_logits.device, generator=generator)
    check_shape(who, noise=(noise, f"K {drawn} 2"))
    with torch.no_grad():
        points, fresh = noise[:, :candidates], noise[:, candidates:]
        if isinstance(mask_logits, Tensor):
            check_shape(who, mask_logits=(mask_logits, "K h w"), noise=(noise, "K R 2"))
            logits = point_sample(mask_logits[:, None], points)[:, 0]
        else:
            logits = mask_logits(points)
            check_shape(who, noise=(noise, "K R 2"), mask_logits=(logits, f"K {candidates}"))
        nearest = (-logits.abs()).topk(chosen, dim=1).indices  # (K, chosen)
        return torch.cat([points.gather(1, nearest[..., None].expand(-1, -1, 2)), fresh], dim=1)
