"""Hide the parts of a picture that match the expression weakly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_float, check_range, check_shape, check_targets
from gresbox.ops import inner_tokens, match_patches, random_projections
from gresbox.ops.block_filter import check_filter_options, drop_weak_blocks, weak_pixels
from gresbox.structures import GresTarget

__all__ = ["AlignmentAwareMasking", "RandomBlockMasking"]

PATIENCE = 100  # steps with nothing, or everything, weak before a warning


class _BlockMasking(nn.Module):
    """What the maskings share: the choice of blocks, the fill, the shares of the last call and the warning."""

    fill: Tensor | None

    def __init__(
        self,
        *,
        drop: float,
        block: int | tuple[int, int],
        unit: str,
        mode: str,
        protect_target: bool,
        fill: float | Sequence[float],
    ) -> None:
        super().__init__()
        for number in fill if isinstance(fill, Sequence) else (fill,):
            if not isinstance(number, Real):
                raise TypeError(f"{type(self).__name__}: `fill` must be a number or one per channel, got {fill!r}.")
        self.drop, self.block, self.unit, self.mode, self.protect_target = drop, block, unit, mode, protect_target
        self.fill_value = 0.0 if isinstance(fill, Sequence) else float(fill)
        colour = torch.tensor(fill, dtype=torch.float32)[:, None, None] if isinstance(fill, Sequence) else None
        self.register_buffer("fill", colour, persistent=False)
        self.shares: dict[str, Tensor] = {}

    def _hide(
        self,
        images: Tensor,
        weak: Tensor,
        targets: Sequence[GresTarget] | Tensor | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """The pictures with blocks filled, and which pixels those are."""
        who = type(self).__name__
        if self.protect_target and targets is None:
            raise ValueError(f"{who}: `targets` must be given with protect_target=True, got None.")
        if self.fill is not None and self.fill.shape[0] != images.shape[1]:
            raise ValueError(
                f"{who}: `fill` must be one number per channel of the images, {images.shape[1]}, got {self.fill.shape[0]}."
            )
        wanted = None if targets is None else target_pixels(who, targets, weak)
        removed, candidates = drop_weak_blocks(
            who,
            weak,
            drop=self.drop,
            block=self.block,
            unit=self.unit,
            mode=self.mode,
            noise=noise,
            generator=generator,
            protected=wanted if self.protect_target else None,
        )
        fill = self.fill_value if self.fill is None else self.fill.to(images.dtype)
        masked = torch.where(removed[:, None], fill, images)
        self.shares = {"weak": _share(weak), "candidate": _share(candidates), "masked": _share(removed)}
        if wanted is not None:
            self.shares["target_hidden"] = (removed & wanted).count_nonzero() / wanted.count_nonzero().clamp(min=1)
        return masked, removed

    def _unusual(self) -> list[str]:
        """What is not at its default and that the line about a masking leaves out otherwise."""
        fill = self.fill_value if self.fill is None else tuple(self.fill.flatten().tolist())
        named = {"protect_target": (self.protect_target, False), "fill": (fill, 0.0)}
        return [f"{name}={value}" for name, (value, default) in named.items() if value != default]


class AlignmentAwareMasking(_BlockMasking):
    r"""Score every patch against the words, and fill a random part of the blocks that match weakly.

    .. math:: \tilde I = I \odot (1 - M),\qquad M = \mathrm{AFM}(\mathrm{PMME}(V, T))

    Paper: "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", arXiv:2602.22740, PMME and AFM.
    Differs from the paper: the logits have a ``scale``, padding takes no part in the match, and the random share is drawn among
    blocks; see :func:`gresbox.ops.match_patches` and :func:`gresbox.ops.filter_blocks`. ``scale=1`` and ``unit="pixel"`` are the
    paper as printed. The scale's default is ours: with it the logits of features that are projected independently have deviation 2
    whatever ``D`` is. Features of one space, matched by one matrix or none, rather want the scale that they were trained with.

    After every call ``shares`` holds, as scalars on the device: ``weak`` pixels, ``candidate`` blocks, ``masked`` pixels and, where
    targets were given, ``target_hidden``, the share of the targets' pixels that was hidden (0 without a target). The block warns,
    once, when nothing or everything was weak for a hundred calls in a row.

    Args:
        visual_dim: Channels ``Cv`` of the feature map.
        text_dim: Channels ``Ct`` of the tokens.
        align_dim: Channels ``D`` of the common space; without a projection, and with given matrices, it is what they have.
        projection: ``"independent"`` Gaussian matrices (the paper's), one ``"shared"`` matrix for both sides, ``"none"``; or the
            two matrices, ``(Cv, D)`` and ``(Ct, D)``. They are fixed and are not part of a checkpoint.
        seed: Names the draw of the matrices; the same in every process.
        scale: Factor of the logits; None: ``2 * sqrt(D)``.
        threshold: Similarity below which a pixel is weak, in [0, 1].
        relative: ``threshold`` is the share of each picture's patches that is weak instead.
        drop: Share of the weak blocks that is hidden, in [0, 1].
        block: Side of a block, or height and width, in pixels.
        unit: ``"block"`` or ``"pixel"``: among what the random choice is made.
        mode: ``"bernoulli"``: each by itself; ``"exact"``: the same number in every picture, up to rounding.
        special_tokens: False: the first and the last real token, a tokenizer's marks, take no part in the match.
        protect_target: Hide no block that touches the target.
        fill: What hidden pixels hold, one number or one per channel; 0 is the mean colour of a normalised picture.

    Shape:
        - ``images``: ``(B, 3, H, W)``; ``visual``: ``(B, Cv, h, w)``; ``tokens``: ``(B, L, Ct)``; ``valid``: ``(B, L)``, True on
          real tokens; ``targets``: ``B`` :class:`~gresbox.structures.GresTarget` or ``(B, H, W)`` bool; ``noise``: as
          :func:`gresbox.ops.filter_blocks` takes it.
        - returns the masked images; ``removed`` ``(B, H, W)`` bool, True on filled pixels; the similarity ``(B, h, w)`` in [0, 1],
          float32. No gradient flows to features; that of the images is cut where they are filled.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If an option is out of range, or a shape does not fit.

    Example:
        >>> import torch
        >>> masking = AlignmentAwareMasking(8, 6, block=16, drop=1.0, threshold=1.0)
        >>> images, visual, tokens = torch.ones(2, 3, 64, 64), torch.randn(2, 8, 4, 4), torch.randn(2, 5, 6)
        >>> masked, removed, similarity = masking(images, visual, tokens)
        >>> masked.sum().item(), masking.shares["masked"].item(), tuple(similarity.shape)
        (0.0, 1.0, (2, 4, 4))
    """

    text_to_visual: Tensor | None

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        *,
        align_dim: int = 2048,
        projection: str | tuple[Tensor, Tensor] = "independent",
        seed: int = 0,
        scale: float | None = None,
        threshold: float = 0.4,
        relative: bool = False,
        drop: float = 0.25,
        block: int | tuple[int, int] = 32,
        unit: str = "block",
        mode: str = "bernoulli",
        special_tokens: bool = True,
        protect_target: bool = False,
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        who = type(self).__name__
        check_filter_options(who, threshold=threshold, drop=drop, block=block, unit=unit, mode=mode)
        super().__init__(drop=drop, block=block, unit=unit, mode=mode, protect_target=protect_target, fill=fill)
        self.visual_dim, self.text_dim, self.align_dim = visual_dim, text_dim, align_dim
        self.projection = projection if isinstance(projection, str) else "given"
        self.threshold, self.relative, self.special_tokens = threshold, relative, special_tokens
        if scale is not None:
            check_range(who, "scale", scale, 0)
        if projection == "none":
            self.align_dim = visual_dim
        if not isinstance(projection, str):
            if not isinstance(projection, (tuple, list)) or len(projection) != 2:
                raise TypeError(f"{who}: `projection` must be a name or two matrices, got {type(projection).__name__}.")
            check_shape(
                who, **{"projection[0]": (projection[0], f"{visual_dim} D"), "projection[1]": (projection[1], f"{text_dim} D")}
            )
            self.align_dim = projection[0].shape[1]
        self.scale = 2.0 * self.align_dim**0.5 if scale is None else float(scale)
        self.register_buffer("text_to_visual", None, persistent=False)
        if isinstance(projection, str):
            self.redraw(seed)
        else:
            self.text_to_visual = _product(projection)
            self.seed = 0
        self._calls, self._warned = 0, False
        self._streak = torch.zeros(2, dtype=torch.int64)  # calls in a row with nothing, and with everything, weak

    def redraw(self, seed: int) -> None:
        """Draw other matrices; called once per step or epoch it makes the projections random over time.

        Args:
            seed: Names the draw.

        Raises:
            ValueError: If the matrices were given.
        """
        who = type(self).__name__
        check_choice(who, "projection", self.projection, ("independent", "shared", "none"))
        self.seed = seed
        if self.projection == "none":
            if self.visual_dim != self.text_dim:
                raise ValueError(
                    f"{who}: `text_dim` must be visual_dim={self.visual_dim} without a projection, got {self.text_dim}."
                )
            return
        shared = self.projection == "shared"
        if shared and self.visual_dim != self.text_dim:
            raise ValueError(f"{who}: `text_dim` must be visual_dim={self.visual_dim} for a shared matrix, got {self.text_dim}.")
        drawn = _product(random_projections(self.visual_dim, self.text_dim, self.align_dim, shared=shared, seed=seed))
        self.text_to_visual = drawn if self.text_to_visual is None else drawn.to(self.text_to_visual)

    def forward(
        self,
        images: Tensor,
        visual: Tensor,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        targets: Sequence[GresTarget] | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        who = type(self).__name__
        named = {"images": (images, "B * H W"), "visual": (visual, f"B {self.visual_dim} h w")}
        named["tokens"] = (tokens, f"B L {self.text_dim}")
        if valid is not None:
            named["valid"] = (valid, "B L")
        check_shape(who, **named)
        check_float(who, images=images, visual=visual, tokens=tokens)
        if valid is not None and valid.is_floating_point():
            raise TypeError(f"{who}: `valid` must be bool or 0/1 integers, got {valid.dtype}.")
        with torch.no_grad():
            matched = valid
            if not self.special_tokens:
                matched = inner_tokens(tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid)
            patches = visual.float().flatten(2).mT  # (B, P, Cv)
            similarity = match_patches(patches, tokens.float(), matched, None, self.text_to_visual, scale=self.scale)
            similarity = similarity.unflatten(1, visual.shape[-2:])
            size = (images.shape[-2], images.shape[-1])
            weak = weak_pixels(who, similarity, size, self.threshold, relative=self.relative)
        masked, removed = self._hide(images, weak, targets, noise, generator)
        if not torch.compiler.is_compiling():
            self._watch()
        return masked, removed, similarity

    def _watch(self) -> None:
        """Count on the device, look at the count every hundred calls: the processor does not wait for the device in between."""
        if self._warned:
            return
        weak = self.shares["weak"]
        extreme = torch.stack([weak <= 0, weak >= 1])
        self._streak = (self._streak.to(weak.device) + 1) * extreme
        self._calls += 1
        if self._calls % PATIENCE:
            return
        nothing, everything = (self._streak >= PATIENCE).tolist()
        if nothing or everything:
            self._warned = True
            what, cure = ("nothing", "lower the scale or raise") if nothing else ("everything", "raise the scale or lower")
            warnings.warn(
                f"{type(self).__name__}: {what} was weak for {PATIENCE} steps at scale {self.scale:.4g} and threshold"
                f" {self.threshold}; {cure} the threshold, or take relative=True.",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        match = f"align_dim={self.align_dim}, projection={self.projection!r}, scale={self.scale:.4g}"
        limit = f"threshold={self.threshold}, relative={self.relative}"
        choice = f"drop={self.drop}, block={self.block}, unit={self.unit!r}, mode={self.mode!r}"
        line = f"{self.visual_dim}, {self.text_dim}, {match}, {limit}, {choice}"
        return ", ".join([line, *self._unusual()])

    def _unusual(self) -> list[str]:
        seed = [f"seed={self.seed}"] if self.seed else []
        return [*seed, *([] if self.special_tokens else ["special_tokens=False"]), *super()._unusual()]


class RandomBlockMasking(_BlockMasking):
    """Fill a random part of all blocks, whatever they show: what alignment-aware masking is to be compared with.

    Paper: "AMLRIS", arXiv:2602.22740, the ablation "random mask", whose share is not printed.

    Args:
        drop: Share of the blocks that is hidden, in [0, 1].
        block: Side of a block, or height and width, in pixels.
        mode: ``"bernoulli"``: each by itself; ``"exact"``: the same number in every picture.
        protect_target: Hide no block that touches the target.
        fill: What hidden pixels hold, one number or one per channel.

    Shape:
        - as :class:`AlignmentAwareMasking`, but features and tokens are not read and may be None; the similarity is a zero per
          picture, ``(B, 1, 1)``.

    Example:
        >>> import torch
        >>> masking = RandomBlockMasking(drop=0.25, block=16, mode="exact")
        >>> masking(torch.ones(2, 3, 64, 64))[0].mean().item()
        0.75
    """

    reads_features = False

    def __init__(
        self,
        *,
        drop: float = 0.25,
        block: int | tuple[int, int] = 32,
        mode: str = "bernoulli",
        protect_target: bool = False,
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        check_filter_options(type(self).__name__, threshold=1.0, drop=drop, block=block, unit="block", mode=mode)
        super().__init__(drop=drop, block=block, unit="block", mode=mode, protect_target=protect_target, fill=fill)

    def forward(
        self,
        images: Tensor,
        visual: Tensor | None = None,
        tokens: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        targets: Sequence[GresTarget] | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_shape(type(self).__name__, images=(images, "B * H W"))
        check_float(type(self).__name__, images=images)
        weak = torch.ones((images.shape[0], *images.shape[-2:]), dtype=torch.bool, device=images.device)
        masked, removed = self._hide(images, weak, targets, noise, generator)
        return masked, removed, torch.zeros((images.shape[0], 1, 1), device=images.device)

    def extra_repr(self) -> str:
        return ", ".join([f"drop={self.drop}, block={self.block}, mode={self.mode!r}", *self._unusual()])


def target_pixels(who: str, targets: Sequence[GresTarget] | Tensor, like: Tensor) -> Tensor:
    """Everything that the targets cover, ``(B, H, W)`` bool, at the size of ``like``; no target pixel is lost."""
    size = (like.shape[-2], like.shape[-1])
    if isinstance(targets, Tensor):
        if check_shape(who, targets=(targets, "B * *"))["B"] != like.shape[0]:
            raise ValueError(f"{who}: `targets` must be one per image with B={like.shape[0]}, got {targets.shape[0]}.")
        if targets.dtype != torch.bool:
            raise TypeError(f"{who}: `targets` must be bool, got {targets.dtype}.")
        merged = list(targets)
    else:
        check_targets(who, targets, like)
        merged = [target.masks.any(0) if target.merged is None else target.merged for target in targets]
    return torch.stack([_covered(pixels, size) for pixels in merged]) if merged else like.new_zeros((0, *size))


def _covered(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape) == size:
        return pixels
    return F.adaptive_max_pool2d(pixels[None].float(), size)[0] > 0


def _share(flags: Tensor) -> Tensor:
    return flags.count_nonzero() / max(flags.numel(), 1)


def _product(matrices: tuple[Tensor, Tensor]) -> Tensor:
    """``W_t W_i^t``, ``(Ct, Cv)``: smaller than the two matrices, and all that the match needs of them."""
    visual, text = (matrix.detach().double() for matrix in matrices)
    return (text @ visual.mT).float()
