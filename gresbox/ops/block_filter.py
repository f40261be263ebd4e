"""Which blocks of a picture are hidden, given how well its patches match an expression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_choice, check_float, check_range, check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["filter_blocks"]


def filter_blocks(
    similarity: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.4,
    relative: bool = False,
    drop: float = 0.25,
    block: int | tuple[int, int] = 32,
    unit: str = "block",
    mode: str = "bernoulli",
    at_least_one: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
) -> Tensor:
    r"""Choose the pixels to hide: whole blocks, a random part of those that match the expression weakly.

    .. math:: W = [\mathrm{up}(S) < \tau], \qquad M_{pq} = \max_{(m,n) \in \mathcal B_{pq}} [(m,n) \in \mathcal P],
        \quad \mathcal P \subseteq W \text{ a random share } \rho

    Paper: "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", arXiv:2602.22740, AFM.
    Differs from the paper: the random share is drawn among blocks (``unit="block"``). Drawn among pixels, as printed
    (``unit="pixel"``), a block with ``k`` weak pixels stays visible with probability ``(1 - drop)^k`` only, so that every weak
    block is hidden whatever ``drop`` says. Blocks at the right and lower edge may be partial.

    Args:
        similarity: How well each patch matches; NaN is not weak.
        image_size: Height and width of the pictures, in pixels.
        threshold: ``tau``: similarity below which a pixel is weak, in [0, 1].
        relative: ``threshold`` is a share instead: the limit is that quantile of each picture's own patches.
        drop: ``rho``: probability, or share, of weak blocks (or pixels) that is hidden, in [0, 1].
        block: Side of a block, or height and width, in pixels.
        unit: ``"block"`` or ``"pixel"``: among what the random choice is made.
        mode: ``"bernoulli"``: each by itself; ``"exact"``: ``floor(drop * n)`` of a picture's ``n``, those with the least noise.
        at_least_one: Hide one where the choice fell on none, if there is any.
        noise: Uniform numbers in [0, 1) that decide; an item is chosen where they are below ``drop``. Default: drawn now.
        generator: Draws the noise, on its own device; None: the global generator of the similarity's device.
        valid: True on real pixels; others are neither weak nor hidden. None: all are real.
        protected: True on pixels that must stay: no block that touches one is hidden.

    Shape:
        - ``similarity``: ``(B, h, w)``, any size; ``valid``, ``protected``: ``(B, H, W)`` bool;
          ``noise``: ``(B, ceil(H / block), ceil(W / block))`` for blocks, ``(B, H, W)`` for pixels.
        - returns ``(B, H, W)`` bool, True where a pixel is hidden.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape does not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[[0.1, 0.9]]])
        >>> filter_blocks(similarity, (2, 8), drop=1.0, block=4).int()
        tensor([[[1, 1, 1, 1, 0, 0, 0, 0],
                 [1, 1, 1, 1, 0, 0, 0, 0]]], dtype=torch.int32)
    """
    who = "filter_blocks"
    check_filter_options(who, threshold=threshold, drop=drop, block=block, unit=unit, mode=mode)
    weak = weak_pixels(who, similarity, image_size, threshold, relative=relative, valid=valid)
    removed, _ = drop_weak_blocks(
        who,
        weak,
        drop=drop,
        block=block,
        unit=unit,
        mode=mode,
        at_least_one=at_least_one,
        noise=noise,
        generator=generator,
        protected=protected,
    )
    return removed if valid is None else removed & valid


def check_filter_options(who: str, *, threshold: float, drop: float, block: int | tuple[int, int], unit: str, mode: str) -> None:
    """Check the numbers and choices of :func:`filter_blocks`; the blocks that keep them check them when they are built."""
    check_range(who, "threshold", threshold, 0, 1)
    check_range(who, "drop", drop, 0, 1)
    check_choice(who, "unit", unit, ("block", "pixel"))
    check_choice(who, "mode", mode, ("bernoulli", "exact"))
    sides = block if isinstance(block, (tuple, list)) else (block, block)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"{who}: `block` must be a whole number of pixels or a pair of them, got {block!r}.")
    check_range(who, "block", min(sides), 1)


def weak_pixels(
    who: str,
    similarity: Tensor,
    image_size: tuple[int, int],
    threshold: float,
    *,
    relative: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Pixels whose similarity, interpolated between patches, is below the threshold: ``(B, H, W)`` bool."""
    sizes = check_shape(who, similarity=(similarity, "B h w"))
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"{who}: `image_size` must be height and width, got {image_size!r}.")
    height, width = image_size
    for name, extent in {"similarity": (sizes["h"], sizes["w"]), "image_size": (height, width)}.items():
        if min(extent) < 1:
            raise ValueError(f"{who}: `{name}` must be at least 1 by 1, got {extent[0]} by {extent[1]}.")
    dtype = accumulation_dtype(who, similarity=similarity)
    with no_autocast(similarity):
        patches = similarity.detach().to(dtype)
        limit: float | Tensor = threshold
        if relative:
            limit = patches.flatten(1).quantile(threshold, dim=1)[:, None, None]
        # Interpolated after the limit is taken off: where patches are at the limit, rounding cannot put pixels below it.
        above = F.interpolate((patches - limit)[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        weak = above < 0
    return weak if valid is None else weak & _flags(who, "valid", valid, weak)


def drop_weak_blocks(
    who: str,
    weak: Tensor,
    *,
    drop: float,
    block: int | tuple[int, int],
    unit: str,
    mode: str,
    at_least_one: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    protected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The hidden pixels ``(B, H, W)`` and the candidate blocks ``(B, ceil(H / block), ceil(W / block))``, both bool."""
    sides, size = _sides(block), (weak.shape[1], weak.shape[2])
    candidates = _touched(weak, sides)
    if protected is not None:
        candidates = candidates & ~_touched(_flags(who, "protected", protected, weak), sides)
    items = candidates if unit == "block" else weak & _pixels(candidates, sides, size)
    if noise is not None and not isinstance(noise, Tensor):
        raise TypeError(f"{who}: `noise` must be a tensor, got {type(noise).__name__}.")
    if noise is None:
        device = items.device if generator is None else generator.device
        noise = torch.rand(items.shape, generator=generator, device=device).to(items.device)
    elif noise.shape != items.shape:
        axes = "(B, ceil(H / block), ceil(W / block))" if unit == "block" else "(B, H, W)"
        raise ValueError(f"{who}: `noise` must be {axes} = {tuple(items.shape)} for unit={unit!r}, got {tuple(noise.shape)}.")
    check_float(who, noise=noise)
    chosen = _choose(items, noise, drop, mode, at_least_one)
    return _pixels(chosen if unit == "block" else _touched(chosen, sides), sides, size), candidates


def _sides(block: int | tuple[int, int]) -> tuple[int, int]:
    return (block, block) if isinstance(block, int) else (block[0], block[1])


def _touched(pixels: Tensor, sides: tuple[int, int]) -> Tensor:
    """Blocks, counted from the upper left corner, that hold at least one of the pixels."""
    rows, columns = -(-pixels.shape[1] // sides[0]), -(-pixels.shape[2] // sides[1])
    missing = (0, columns * sides[1] - pixels.shape[2], 0, rows * sides[0] - pixels.shape[1])
    whole = pixels.to(torch.uint8)
    if any(missing):
        whole = F.pad(whole, missing)
    # Rows of a block first: neighbours in memory stay neighbours, which is many times faster than both axes at once.
    bands = whole.unflatten(1, (rows, sides[0])).amax(2)
    return bands.unflatten(2, (columns, sides[1])).amax(3) > 0


def _pixels(blocks: Tensor, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The pixels of blocks, cut to the pictures' size."""
    batch, rows, columns = blocks.shape
    pixels = blocks[:, :, None, :, None].expand(batch, rows, sides[0], columns, sides[1])
    return pixels.reshape(batch, rows * sides[0], columns * sides[1])[:, : size[0], : size[1]].contiguous()


def _choose(items: Tensor, noise: Tensor, drop: float, mode: str, at_least_one: bool) -> Tensor:
    """A random part of the True items of each picture."""
    ranked = noise.masked_fill(~items, float("inf")).flatten(1)
    if mode == "bernoulli":
        chosen = items & (noise < drop)
        if at_least_one:
            least = F.one_hot(ranked.argmin(1), ranked.shape[1]).bool().view_as(items)
            chosen = chosen | (least & items & ~chosen.flatten(1).any(1)[:, None, None])
        return chosen
    wanted = (items.flatten(1).sum(1, keepdim=True).double() * drop).floor()  # as Python's int(drop * n)
    if at_least_one:
        wanted = wanted.clamp(min=1)
    order = ranked.argsort(dim=1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return items & (rank < wanted).view_as(items)


def _flags(who: str, name: str, flags: Tensor, like: Tensor) -> Tensor:
    if flags.dtype != torch.bool:
        raise TypeError(f"{who}: `{name}` must be bool, got {flags.dtype}.")
    if flags.shape != like.shape:
        raise ValueError(f"{who}: `{name}` must be (B, H, W) = {tuple(like.shape)}, got {tuple(flags.shape)}.")
    return flags
