"""The dataclasses that travel between the parts: targets, predictions, outputs, samples and recipes.

All are frozen. Those that hold tensors are registered pytrees, so they pass through ``torch.compile``, ``torch.export`` and
``DistributedDataParallel`` like tuples. Axis letters: B batch, N queries, M instances, L tokens, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape

__all__ = [
    "GresOutput",
    "GresPrediction",
    "GresSample",
    "GresTarget",
    "InstancePrediction",
    "PaddedTargets",
    "Recipe",
    "masks_to_boxes",
]

_T = TypeVar("_T")


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of binary masks: outer pixel borders, as centre, width and height relative to the image.

    Args:
        masks: Boolean masks.

    Shape:
        - ``masks``: ``(M, H, W)`` bool; returns ``(M, 4)`` float32 cxcywh in [0, 1]. An empty mask has the box 0, 0, 0, 0.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 4, 8, dtype=torch.bool)
        >>> mask[0, 1:3, 2:4] = True
        >>> masks_to_boxes(mask)
        tensor([[0.3750, 0.5000, 0.2500, 0.5000]])
    """
    height, width = masks.shape[-2:]
    rows, columns = masks.any(-1), masks.any(-2)  # (M, H), (M, W)
    x0, x1 = _extent(columns, width)
    y0, y1 = _extent(rows, height)
    box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    return box * rows.any(-1, keepdim=True)


def _extent(occupied: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and one-past-last True along the last axis, divided by the size."""
    position = torch.arange(size, device=occupied.device, dtype=torch.float32)
    first = torch.where(occupied, position, float(size)).amin(-1)
    last = torch.where(occupied, position + 1, 0.0).amax(-1)
    return first / size, last / size


def _to(item: _T, device: torch.device | str) -> _T:
    """Move every tensor field of a dataclass, tuples and dicts of tensors included."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, InstancePrediction):
            return _to(value, device)
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return value

    return replace(item, **{f.name: move(getattr(item, f.name)) for f in fields(item)})  # type: ignore[type-var,arg-type]


@dataclass(frozen=True, eq=False)
class GresTarget:
    """What an expression refers to in one image.

    Args:
        masks: The referred instances; none for a no-target expression.
        boxes: Their boxes; default: the tight boxes of the masks.
        merged: Everything that is referred to; default: the union of the masks. It may hold more than the masks do, for example
            when crowd regions are not instances.
        no_target: Whether the expression refers to nothing; default: whether there are no instances.

    Shape:
        - ``masks``: ``(M, H, W)`` bool, M may be 0; ``boxes``: ``(M, 4)`` cxcywh in [0, 1]; ``merged``: ``(H, W)`` bool.

    Raises:
        TypeError: If ``masks`` is not bool.
        ValueError: If the shapes disagree.

    Example:
        >>> import torch
        >>> target = GresTarget(torch.zeros(0, 8, 8, dtype=torch.bool))
        >>> target.no_target, tuple(target.boxes.shape), tuple(target.merged.shape)
        (True, (0, 4), (8, 8))
    """

    masks: Tensor
    boxes: Tensor | None = None
    merged: Tensor | None = field(default=None, kw_only=True)
    no_target: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Tensor):  # a pytree being rebuilt with other leaves
            return
        check_shape("GresTarget", masks=(self.masks, "M H W"))
        if self.masks.dtype != torch.bool:
            raise TypeError(f"GresTarget: `masks` must be bool, got {self.masks.dtype}.")
        if self.boxes is None:
            object.__setattr__(self, "boxes", masks_to_boxes(self.masks))
        if self.merged is None:
            object.__setattr__(self, "merged", self.masks.any(0))
        if self.no_target is None:
            object.__setattr__(self, "no_target", self.masks.shape[0] == 0)
        if isinstance(self.boxes, Tensor) and isinstance(self.merged, Tensor):
            check_shape("GresTarget", masks=(self.masks, "M H W"), boxes=(self.boxes, "M 4"), merged=(self.merged, "H W"))

    def to(self, device: torch.device | str) -> GresTarget:
        """The same target on another device."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class PaddedTargets:
    """The targets of a batch in tensors whose shapes do not depend on how many instances there are.

    A step on them can be recorded once and replayed (``gresbox.training.capture_step``). :class:`InstAlignCriterion
    <gresbox.losses.InstAlignCriterion>` and its matcher take them in place of a list, with the same result.

    Args:
        masks: The instances of each image, then empty masks.
        counts: How many of an image's masks are instances.
        merged: Everything that is referred to in each image.
        no_target: Whether an expression refers to nothing.

    Shape:
        - ``masks``: ``(B, M, H, W)`` bool; ``counts``: ``(B,)`` int64; ``merged``: ``(B, H, W)`` bool; ``no_target``: ``(B,)``
          bool.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If the shapes disagree.

    Example:
        >>> import torch
        >>> some, none = (GresTarget(torch.ones(count, 4, 4, dtype=torch.bool)) for count in (2, 0))
        >>> padded = PaddedTargets.pack([some, none], 5)
        >>> padded.masks.shape, padded.counts, padded.no_target
        (torch.Size([2, 5, 4, 4]), tensor([2, 0]), tensor([False,  True]))
    """

    masks: Tensor
    counts: Tensor
    merged: Tensor
    no_target: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Tensor):  # a pytree being rebuilt with other leaves
            return
        check_shape(
            "PaddedTargets",
            masks=(self.masks, "B M H W"),
            counts=(self.counts, "B"),
            merged=(self.merged, "B H W"),
            no_target=(self.no_target, "B"),
        )
        for name, dtype in {"masks": torch.bool, "counts": torch.int64, "merged": torch.bool, "no_target": torch.bool}.items():
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"PaddedTargets: `{name}` must be {dtype}, got {getattr(self, name).dtype}.")

    @classmethod
    def pack(cls, targets: Sequence[GresTarget], most: int) -> PaddedTargets:
        """Put a list of targets of one size into padded tensors; nothing waits for the device.

        Args:
            targets: One per image, at least one.
            most: Places ``M`` per image.

        Raises:
            ValueError: If an image has more than ``most`` instances, or the targets differ in size.
        """
        counts = [target.masks.shape[0] for target in targets]
        if not targets or max(counts) > most:
            raise ValueError(f"PaddedTargets.pack: `most` must be at least the instances of each image, got {most} for {counts}.")
        sizes = sorted({tuple(target.masks.shape[-2:]) for target in targets})
        if len(sizes) > 1:
            raise ValueError(f"PaddedTargets.pack: `targets` must all have one image size, got {sizes[0]} and {sizes[-1]}.")
        device = targets[0].masks.device
        rest = [F.pad(target.masks, (0, 0, 0, 0, 0, most - count)) for target, count in zip(targets, counts, strict=True)]
        masks = torch.stack(rest)
        merged = torch.stack([target.merged for target in targets if target.merged is not None])
        flags = torch.tensor([bool(target.no_target) for target in targets])
        numbers = torch.tensor(counts, dtype=torch.int64)
        return cls(masks, numbers.to(device, non_blocking=True), merged, flags.to(device, non_blocking=True))

    def __len__(self) -> int:
        return self.masks.shape[0]

    def to(self, device: torch.device | str) -> PaddedTargets:
        """The same targets on another device."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class InstancePrediction:
    """What one decoder step predicts. Masks stay factored, embeddings times pixel features, until somebody asks for them.

    Args:
        score_logits: Relevance of each query to the expression, as logits.
        mask_embeddings: One vector per query; its product with ``pixels`` is the query's mask.
        pixels: Per-pixel features, usually at a quarter of the image's size.
        queries: The block's raw output (the phrase-object alignment loss reads it).
        tokens: The text features that belong to this step.
        valid: True on real tokens; None: all are real.
        boxes: Predicted boxes, cxcywh in [0, 1], or None.
        points: Reference points, xy in [0, 1], or None.
        normed: The queries as the prediction heads saw them (after the decoder's last norm); None: ``queries``.

    Shape:
        - ``score_logits``: ``(B, N)``; ``mask_embeddings``: ``(B, N, C)``; ``pixels``: ``(B, C, h, w)``; ``queries``, ``normed``:
          ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``; ``boxes``: ``(B, N, 4)``; ``points``: ``(B, N, 2)``.
    """

    score_logits: Tensor
    mask_embeddings: Tensor
    pixels: Tensor
    queries: Tensor
    tokens: Tensor
    valid: Tensor | None = None
    boxes: Tensor | None = None
    points: Tensor | None = None
    normed: Tensor | None = None

    @property
    def masks(self) -> Tensor:
        """All mask logits, ``(B, N, h, w)`` float32, built now; ask only when all are needed."""
        with torch.autocast(self.pixels.device.type, enabled=False):
            product = self.mask_embeddings.float() @ self.pixels.float().flatten(2)
        return product.unflatten(-1, self.pixels.shape[-2:])

    def masks_of(self, batch_idx: Tensor, query_idx: Tensor) -> Tensor:
        """Mask logits of chosen queries only.

        Args:
            batch_idx: Image of each chosen mask.
            query_idx: Query of each chosen mask.

        Shape:
            - both ``(K,)`` int64; returns ``(K, h, w)`` float32.
        """
        check_shape("InstancePrediction.masks_of", batch_idx=(batch_idx, "K"), query_idx=(query_idx, "K"))
        batch, _, height, width = self.pixels.shape
        chosen = self.mask_embeddings[batch_idx, query_idx].float()  # (K, C)
        count = torch.nn.functional.one_hot(batch_idx, batch).cumsum(0)  # (K, B): how many of an image's masks so far
        place = count.gather(1, batch_idx[:, None])[:, 0] - 1  # each mask's place among its image's
        padded = chosen.new_zeros(batch, max(batch_idx.shape[0], 1), chosen.shape[-1])
        padded = padded[:, : int(place.max()) + 1] if place.numel() else padded[:, :0]
        padded = padded.index_put((batch_idx, place), chosen)  # (B, most, C): one product per image, its pixels read in place
        with torch.autocast(self.pixels.device.type, enabled=False):
            masks = padded @ self.pixels.float().flatten(2)
        return masks[batch_idx, place].unflatten(-1, (height, width))

    @classmethod
    def from_masks(
        cls, score_logits: Tensor, masks: Tensor, queries: Tensor, tokens: Tensor, valid: Tensor | None = None
    ) -> InstancePrediction:
        """A prediction from mask logits ``(B, N, h, w)``: the masks are the pixel features, the embeddings the identity."""
        sizes = check_shape(
            "InstancePrediction.from_masks",
            score_logits=(score_logits, "B N"),
            masks=(masks, "B N h w"),
            queries=(queries, "B N C"),
            tokens=(tokens, "B L C"),
        )
        identity = torch.eye(sizes["N"], dtype=masks.dtype, device=masks.device).expand(sizes["B"], -1, -1)
        return cls(score_logits, identity, masks, queries, tokens, valid)


@dataclass(frozen=True, eq=False)
class GresOutput:
    """What every model's ``forward`` returns.

    Args:
        merged: Logits of everything the expression refers to.
        no_target: No-target logits, positive = the expression refers to nothing; None: an empty mask means no target.
        instances: The last decoder step's instances, or None for a model without instances.
        aux: The earlier steps' instances.
        align_corners: How the model's own way of resizing treats corners.
        extras: What only this model's criterion or post-processing reads.

    Shape:
        - ``merged``: ``(B, h, w)``; ``no_target``: ``(B,)``.
    """

    merged: Tensor
    no_target: Tensor | None = None
    instances: InstancePrediction | None = None
    aux: tuple[InstancePrediction, ...] = ()
    align_corners: bool = False
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def boxes(self) -> Tensor | None:
        """Boxes of the last step's instances."""
        return None if self.instances is None else self.instances.boxes

    @property
    def points(self) -> Tensor | None:
        """Reference points of the last step's instances."""
        return None if self.instances is None else self.instances.points

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The merged logits at another size, ``(B, H, W)`` float32, bilinear as the model does it."""
        merged = self.merged.float()[:, None]
        return F.interpolate(merged, size=size, mode="bilinear", align_corners=self.align_corners)[:, 0]

    def to(self, device: torch.device | str) -> GresOutput:
        """The same output on another device."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class GresPrediction:
    """The answer for one image and one expression, at the image's own size.

    Args:
        text: The expression.
        mask: Everything that it refers to; empty when the answer is "nothing".
        no_target_prob: Probability that it refers to nothing, or None where the model has no such output.
        scores: Relevance of each kept instance, highest first.
        instance_masks: One mask per kept instance.
        boxes_xyxy: One box per kept instance, in pixels.
        phrases: Per instance, the words it answered to with weights that sum to 1; or None.
        points: Reference point of each kept instance, xy in pixels, or None where the model has none.

    Shape:
        - ``mask``: ``(H, W)`` bool; ``scores``: ``(K,)`` in [0, 1]; ``instance_masks``: ``(K, H, W)`` bool;
          ``boxes_xyxy``: ``(K, 4)``.
    """

    text: str
    mask: Tensor
    no_target_prob: float | None
    scores: Tensor
    instance_masks: Tensor
    boxes_xyxy: Tensor
    phrases: list[list[tuple[str, float]]] | None = None
    points: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GresSample:
    """One image with one expression and its truth, as every dataset of ``gresbox.data`` returns it.

    Args:
        image: The picture, RGB.
        text: The expression.
        target: What it refers to, at the picture's size.
        image_id: The picture's id in its dataset.
        ref_id: The id of the reference the sentence belongs to.
        sent_id: The sentence's id.
        kind: ``"one"``, ``"many"`` or ``"zero"`` referred instances.
        exists: Whether the expression is true of the picture.

    Shape:
        - ``image``: ``(3, H, W)`` uint8.
    """

    image: Tensor
    text: str
    target: GresTarget
    image_id: int = 0
    ref_id: int = 0
    sent_id: int = 0
    kind: str = "one"
    exists: bool = True


@dataclass(frozen=True)
class Recipe:
    """The numbers a model is trained with.

    Args:
        optimizer: ``"adamw"``, or ``"adam"`` (its weight decay is part of the gradient).
        schedule: ``"linear"``, ``"step"``, ``"poly"``, ``"cosine"`` or ``"constant"``, applied per optimiser step.
        lr: Peak learning rate.
        final_lr: Learning rate at the end of ``linear``, ``poly`` and ``cosine``.
        epochs: Passes over the training set.
        batch: Samples per optimiser step, over all processes and accumulation steps.
        clip: Largest global gradient norm; 0 switches clipping off.
        image_size: Side of the square that pictures are resized to.
        amp: ``"no"``, ``"bf16"`` or ``"fp16"``.
        weight_decay: Weight decay of matrices.
        backbone_lr_scale: Factor on the learning rate of pretrained encoders.
        warmup: Steps of linear warm-up.
        power: Exponent of ``poly``.
        milestones: Fractions of training at which ``step`` multiplies the rate by ``gamma``.
        gamma: Factor of ``step``.
        betas: Decay of the optimiser's two running means.
        eps: Added to its denominator.
        amsgrad: Keep the largest second moment seen.
    """

    optimizer: str = "adamw"
    schedule: str = "linear"
    lr: float = 1e-4
    final_lr: float = 1e-6
    epochs: float = 20
    batch: int = 32
    clip: float = 0.01
    image_size: int = 480
    amp: str = "no"
    weight_decay: float = 0.05
    backbone_lr_scale: float = 0.1
    warmup: int = 0
    power: float = 0.9
    milestones: tuple[float, ...] = (0.9,)
    gamma: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


for _structure in (GresTarget, PaddedTargets, InstancePrediction, GresOutput):
    torch.export.register_dataclass(_structure)
