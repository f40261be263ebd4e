"""Optimal matching of queries to target instances, for all decoder steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape, check_targets
from gresbox.ops import align_phrases, assign, point_sample, query_mask_cost, stack_masks
from gresbox.ops._late_errors import LateError
from gresbox.structures import GresTarget, InstancePrediction, PaddedTargets

__all__ = ["HungarianInstanceMatcher"]

_LARGE = 2**18  # mask logits of an image from which on a CPU gains nothing by taking several at once


class HungarianInstanceMatcher(nn.Module):
    r"""Which query answers for which target instance: the one-to-one matching of smallest total cost.

    .. math:: \omega^* = \arg\min_\omega \sum_i \lambda_{score} \mathrm{BCE}(\hat p_{\omega_i}, 1)
        + \lambda_{mask} (\mathrm{BCE} + \mathrm{dice})(\hat s_{\omega_i}, s_i) + \lambda_{phrase} L_{phrase}(\omega_i)

    Paper: arXiv:2411.15087, Sec. 3.4, Eq. (5)-(6), weights from the supplement.
    Differs from the paper: nothing. Masks are compared on all pixels at their own size, with area-averaged targets;
    ``num_points=12544`` compares them on random points, as Mask2Former does.

    All steps whose ``pixels`` are one tensor are priced in one pass, and one assignment serves the whole batch. Where kernels
    run nothing waits for the device, and a NaN is reported by a later call (see :func:`gresbox.ops.assign`); elsewhere there is a
    single copy from the device per call. Nothing here carries a gradient.

    Args:
        score: Weight of the score cost.
        mask: Weight of the two mask costs, each.
        phrase: Weight of the phrase-object alignment cost.
        num_points: Points per image, the same for all its queries and targets; None: all pixels.
        first_phrase_step: The first step with a phrase cost in :meth:`match_steps`; the prediction before the first block has seen
            neither image nor text.
        nan: ``"error"``, or ``"large"``: a NaN cost warns and counts as larger than any other.
        generator: Source of the random points, on the prediction's device.

    Shape:
        - ``forward(prediction, targets)`` returns one pair ``(query_idx, target_idx)`` of int64 per image, each ``(min(N, M_b),)``,
          ordered by target.
        - ``match_steps(predictions, targets)`` returns ``(S, B, M)`` int64: the query of each target, -1 where none; it takes
          :class:`~gresbox.structures.PaddedTargets` too.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If the number of targets disagrees, a target is on another device, or a cost is NaN; the message names the term
            and what it was computed from.

    Example:
        >>> import torch
        >>> masks = torch.full((1, 3, 4, 4), -9.0)
        >>> masks[0, 1, :2], masks[0, 2, 2:] = 9.0, 9.0
        >>> step = InstancePrediction.from_masks(torch.zeros(1, 3), masks, torch.randn(1, 3, 8), torch.randn(1, 5, 8))
        >>> target = GresTarget((masks[0, [2, 1]] > 0))
        >>> HungarianInstanceMatcher()(step, [target])
        [(tensor([2, 1]), tensor([0, 1]))]
        >>> HungarianInstanceMatcher().match_steps([step, step], [target])
        tensor([[[2, 1]],
        <BLANKLINE>
                [[2, 1]]])
    """

    def __init__(
        self,
        *,
        score: float = 2.0,
        mask: float = 5.0,
        phrase: float = 1.0,
        num_points: int | None = None,
        first_phrase_step: int = 1,
        nan: str = "error",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, weight in {"score": score, "mask": mask, "phrase": phrase}.items():
            check_range("HungarianInstanceMatcher", name, weight, 0.0)
        if num_points is not None:
            check_range("HungarianInstanceMatcher", "num_points", num_points, 1)
        check_choice("HungarianInstanceMatcher", "nan", nan, ("error", "large"))
        self.score, self.mask, self.phrase = score, mask, phrase
        self.num_points = num_points
        self.first_phrase_step = first_phrase_step
        self.nan = nan
        self.generator = generator

    def forward(self, prediction: InstancePrediction, targets: Sequence[GresTarget]) -> list[tuple[Tensor, Tensor]]:
        rows = self.match_steps((prediction,), targets, first_phrase_step=0)[0]  # (B, M)
        queries = prediction.score_logits.shape[1]
        pairs = []
        for row, target in zip(rows, targets, strict=True):
            count = target.masks.shape[0]
            matched = torch.arange(count, device=row.device)
            if count > queries:  # only then are some targets left without a query, and only then does the host ask which
                matched = row[:count].ge(0).nonzero()[:, 0]
            pairs.append((row[matched], matched))
        return pairs

    @torch.no_grad()
    def match_steps(
        self,
        predictions: Sequence[InstancePrediction],
        targets: Sequence[GresTarget] | PaddedTargets,
        *,
        first_phrase_step: int | None = None,
    ) -> Tensor:
        """Match several decoder steps with the same targets.

        Args:
            predictions: The steps, all with the same numbers of images and queries.
            targets: One target per image, or all of them padded.
            first_phrase_step: Overrides the matcher's own; the number of steps or more switches the phrase cost off.

        Shape:
            - returns ``(S, B, M)`` int64 with M the largest number of instances of an image; -1 where none.
        """
        _check_steps(predictions)
        check_targets("HungarianInstanceMatcher", targets, predictions[0].score_logits)
        scores = torch.stack([step.score_logits for step in predictions])  # (S, B, N)
        steps, batch, queries = scores.shape
        masks = list(targets.masks) if isinstance(targets, PaddedTargets) else [target.masks for target in targets]
        counts = [part.shape[0] for part in masks]
        if max(counts, default=0) == 0:
            return scores.new_empty((steps, batch, 0), dtype=torch.int64)
        cost = _wide(scores).new_zeros((steps, batch, queries, max(counts)))
        if self.mask:
            bce, dice = self._mask_costs(predictions, masks)
            cost += self.mask * (bce + dice)
        if self.score:
            cost += self.score * F.softplus(-_wide(scores))[..., None]
        first = self.first_phrase_step if first_phrase_step is None else first_phrase_step
        if self.phrase and first < steps:
            cost[first:] += self.phrase * _phrase_costs(predictions[first:])[..., None]
        num_targets = targets.counts.repeat(steps) if isinstance(targets, PaddedTargets) else torch.tensor(counts * steps)
        try:
            rows = assign(cost.flatten(0, 1), num_targets, nan=self.nan)
        except LateError:  # of an earlier batch: this one's inputs say nothing about it
            raise
        except ValueError as error:
            raise ValueError(self._blame(predictions, first)) from error
        return rows.unflatten(0, (steps, batch))

    def _mask_costs(self, predictions: Sequence[InstancePrediction], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice of every query with every target, two ``(S, B, N, M)``."""
        pixels = predictions[0].pixels
        points = None
        if self.num_points is not None:
            points = torch.rand((len(masks), self.num_points, 2), generator=self.generator, device=pixels.device)
        if all(step.pixels is pixels for step in predictions):  # one pass over the pixels
            queries = torch.cat([step.mask_embeddings for step in predictions], 1)  # (B, S * N, C)
            bce, dice = (cost.unflatten(1, (len(predictions), -1)) for cost in _price(queries, pixels, masks, points))
            return bce.transpose(0, 1), dice.transpose(0, 1)
        costs = [_price(step.mask_embeddings, step.pixels, masks, points) for step in predictions]
        return torch.stack([bce for bce, _ in costs]), torch.stack([dice for _, dice in costs])

    def _blame(self, predictions: Sequence[InstancePrediction], first_phrase_step: int) -> str:
        """Name the cost that was not a number and the tensor it came from; runs after the error, so a good step pays nothing."""
        for index, step in enumerate(predictions):
            read = [("score", "score_logits", self.score), ("mask bce and mask dice", "mask_embeddings", self.mask)]
            read += [("mask bce and mask dice", "pixels", self.mask)]
            if index >= first_phrase_step:
                read += [("phrase", "queries", self.phrase), ("phrase", "tokens", self.phrase)]
            for term, name, weight in read:
                values = getattr(step, name)
                if name == "tokens" and step.valid is not None:
                    values = values[step.valid.bool()]
                if weight and not values.isfinite().all():
                    kind = "NaN" if values.isnan().any() else "infinite"
                    because = f"must be finite because the {term} cost reads it, got {kind} values."
                    return f"HungarianInstanceMatcher: `{name}` of step {index} {because}"
        return (
            "HungarianInstanceMatcher: `predictions` must give finite mask costs, got NaN of finite inputs: mask logits overflow."
        )

    def extra_repr(self) -> str:
        return f"score={self.score}, mask={self.mask}, phrase={self.phrase}, num_points={self.num_points}"


def _check_steps(predictions: Sequence[InstancePrediction]) -> None:
    """One step at least, and all of the same numbers of images and queries."""
    if not predictions:
        raise ValueError("HungarianInstanceMatcher: `predictions` must be at least one decoder step, got none.")
    sizes: dict[str, tuple[Tensor, str]] = {}
    for index, step in enumerate(predictions):
        sizes[f"score_logits of step {index}"] = (step.score_logits, "B N")
        sizes[f"mask_embeddings of step {index}"] = (step.mask_embeddings, "B N C")
        sizes[f"pixels of step {index}"] = (step.pixels, "B C h w")
    check_shape("HungarianInstanceMatcher", **sizes)


def _wide_dtype(values: Tensor) -> torch.dtype:
    """Float32 at least: costs rounded to 16 bits would tie."""
    return torch.promote_types(values.dtype, torch.float32)


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


def _price(queries: Tensor, pixels: Tensor, masks: Sequence[Tensor], points: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two mask costs ``(B, N, M)``; large images on a CPU one by one, each with its own number of targets."""
    batch, most = len(masks), max(part.shape[0] for part in masks)
    found = queries.new_zeros((2, batch, queries.shape[1], most), dtype=_wide_dtype(queries))
    compared = pixels[0, 0].numel() if points is None else points.shape[1]
    size = 1 if pixels.device.type == "cpu" and queries.shape[1] * compared >= _LARGE else batch
    for start in range(0, batch, size):
        images = slice(start, start + size)
        count = max(part.shape[0] for part in masks[images])
        if count == 0:
            continue
        if points is None:
            features, (truth, _) = pixels[images], stack_masks(masks[images], (pixels.shape[-2], pixels.shape[-1]))
        else:  # sampling is linear, so it may come before the product with queries
            features = point_sample(pixels[images], points[images])[..., None]  # (B, C, P, 1)
            truth = point_sample(stack_masks(masks[images], dtype=torch.bool)[0], points[images])[..., None]
        for cost, values in zip(found, query_mask_cost(queries[images], features, truth, dtype=found.dtype), strict=True):
            cost[images, :, :count] = values
    return found[0], found[1]


def _phrase_costs(predictions: Sequence[InstancePrediction]) -> Tensor:
    """Phrase-object alignment of every query of every step, ``(S, B, N)``; all steps are one batch."""
    queries = _wide(torch.cat([step.queries for step in predictions]))
    tokens = torch.cat([step.tokens for step in predictions])
    valid = predictions[0].valid
    distance, _ = align_phrases(queries, tokens, None if valid is None else valid.repeat(len(predictions), 1))
    return distance.unflatten(0, (len(predictions), -1))
