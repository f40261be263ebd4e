"""Put samples together for a model's processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gresbox.structures import GresSample, GresTarget

__all__ = ["Batch", "collate"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side; entry ``i`` of every field belongs to sample ``i``.

    Args:
        images: Pictures, stacked where all have one size, else a list.
        texts: Expressions.
        targets: Truths.
        kinds: ``"zero"``, ``"one"`` or ``"many"``.
        exists: Whether the expression is true of the picture.
        image_ids: Pictures' ids.
        ref_ids: References' ids.
        sent_ids: Sentences' ids.
        tokens: What the tokenizer made of the texts, padded to the longest; empty without a tokenizer.

    Shape:
        - ``images``: ``(B, 3, H, W)`` uint8, or a list of ``(3, H_i, W_i)``; ``tokens``: each ``(B, L)``.
    """

    images: Tensor | list[Tensor]
    texts: list[str]
    targets: list[GresTarget]
    kinds: list[str]
    exists: list[bool]
    image_ids: list[int]
    ref_ids: list[int]
    sent_ids: list[int]
    tokens: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; a ``DataLoader`` with ``pin_memory=True`` calls it."""
        images = self.images.pin_memory() if isinstance(self.images, Tensor) else [image.pin_memory() for image in self.images]
        targets = [
            GresTarget(
                target.masks.pin_memory(),
                None if target.boxes is None else target.boxes.pin_memory(),
                merged=None if target.merged is None else target.merged.pin_memory(),
                no_target=target.no_target,
            )
            for target in self.targets
        ]
        tokens = {name: value.pin_memory() for name, value in self.tokens.items()}
        return replace(self, images=images, targets=targets, tokens=tokens)


def collate(samples: Sequence[GresSample], *, tokenize: Callable[[list[str]], Mapping[str, Tensor]] | None = None) -> Batch:
    """Collate samples, for ``DataLoader(collate_fn=collate)``; works in worker processes however they are started.

    Targets stay ragged, one per sample.

    Args:
        samples: At least one sample.
        tokenize: Makes padded tensors of the texts, as ``model.processor.process_texts`` does; give it to a loader as
            ``functools.partial(collate, tokenize=...)``.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from gresbox.data import SyntheticGRES
        >>> data = SyntheticGRES("val", 2)
        >>> batch = collate([data[0], data[1]])
        >>> tuple(batch.images.shape), len(batch.texts)
        ((2, 3, 64, 64), 2)
    """
    if not samples:
        raise ValueError("collate: `samples` must be at least one sample, got none.")
    images = [sample.image for sample in samples]
    return Batch(
        images=torch.stack(images) if len({image.shape for image in images}) == 1 else images,
        texts=[sample.text for sample in samples],
        targets=[sample.target for sample in samples],
        kinds=[sample.kind for sample in samples],
        exists=[sample.exists for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        ref_ids=[sample.ref_id for sample in samples],
        sent_ids=[sample.sent_id for sample in samples],
        tokens={} if tokenize is None else dict(tokenize([sample.text for sample in samples])),
    )
