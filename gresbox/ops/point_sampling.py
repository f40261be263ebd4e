"""Reading maps at points, and choosing points where masks are uncertain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_range, check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["point_sample", "uncertain_points"]

_MANY_MAPS = 64  # from here on a CPU samples maps one by one faster than as channels: 1.5x forward, 2x and more with gradients


def point_sample(masks: Tensor, points: Tensor) -> Tensor:
    """Read maps at points: bilinear between pixel centres, zero outside.

    Paper: Kirillov et al., "PointRend", arXiv:1912.08193, Sec. 3.1. Differs from the paper: nothing.

    Args:
        masks: Maps to read; bool maps count as 0 and 1.
        points: Where, with (0, 0) the upper left corner of the upper left pixel and (1, 1) the lower right corner of the last.

    Shape:
        - ``masks``: ``(B, N, H, W)``; ``points``: ``(B, K, 2)`` xy; returns ``(B, N, K)``.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> point_sample(torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[0.25, 0.5], [0.5, 0.5]]]))
        tensor([[[0., 2.]]])
    """
    sizes = check_shape("point_sample", masks=(masks, "B N H W"), points=(points, "B K 2"))
    maps = masks if masks.is_floating_point() else masks.float()
    dtype = accumulation_dtype("point_sample", masks=maps, points=points)
    if 0 in tuple(sizes.values()):  # grid_sample takes no empty map
        return maps.new_zeros((sizes["B"], sizes["N"], sizes["K"]))
    with no_autocast(maps):
        grid, values = (2 * points.to(dtype) - 1)[:, :, None], maps.to(dtype)  # (B, K, 1, 2)
        each = maps.device.type == "cpu" and sizes["N"] >= _MANY_MAPS
        if each:  # the same numbers; the CPU's kernel jumps from channel to channel at every point
            grid = grid[:, None].expand(-1, sizes["N"], -1, -1, -1).flatten(0, 1)
            values = values.flatten(0, 1)[:, None]
        values = F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if each:
            values = values[:, 0].unflatten(0, (sizes["B"], sizes["N"]))
    return values[..., 0].to(maps.dtype)


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
        ValueError: If an argument is out of its range, a shape does not fit, or a function comes without ``noise``.

    Example:
        >>> import torch
        >>> uncertain_points(torch.randn(3, 8, 8), 16, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 16, 2])
    """
    who = "uncertain_points"
    check_range(who, "num_points", num_points, low=1)
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
