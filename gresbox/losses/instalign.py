"""InstAlign's criterion: instances, the merged mask and the no-target flag, each with its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_targets
from gresbox.losses.mask import MaskLoss, take_queries
from gresbox.losses.no_target import no_target_loss
from gresbox.losses.poa import POALoss
from gresbox.losses.targets import (
    Targets,
    check_one_size,
    instance_masks,
    instance_normaliser,
    merged_targets,
    no_target_flags,
)
from gresbox.ops import mask_bce, mask_dice, stack_masks
from gresbox.structures import GresOutput, InstancePrediction

__all__ = ["InstAlignCriterion", "InstAlignWeights"]


@dataclass(frozen=True)
class InstAlignWeights:
    """The weights of InstAlign's losses; the defaults are the paper's (arXiv:2411.15087, supplement, Sec. 8).

    Args:
        score: Score loss of matched queries.
        mask: Mask loss of matched queries, for cross-entropy and dice each.
        phrase: Phrase-object alignment loss of matched queries.
        merged: Loss of the merged mask, for cross-entropy and dice each.
        instance: Everything that concerns instances: score, mask and phrase.
        no_target: No-target loss.
        unmatched: Score loss of unmatched queries, not multiplied with ``score``; None: 1 as in Eq. (7), and 0.1 with the
            criterion's ``score_reduction="m2f"``, where it is a class weight.
        no_target_classes: Weights of samples with a target and without in the no-target loss; ReLA has (0.9, 1.1).

    Example:
        >>> InstAlignWeights(phrase=0.5)
        InstAlignWeights(score=2.0, mask=5.0, phrase=0.5, merged=5.0, instance=1.0, no_target=0.1, unmatched=None,
        no_target_classes=(1.0, 1.0))
    """

    score: float = 2.0
    mask: float = 5.0
    phrase: float = 1.0
    merged: float = 5.0
    instance: float = 1.0
    no_target: float = 0.1
    unmatched: float | None = None
    no_target_classes: tuple[float, float] = (1.0, 1.0)


class InstAlignCriterion(nn.Module):
    r"""The training loss of InstAlign.

    .. math:: L = \lambda_{merged} L_{merged} + \lambda_{inst} L_{inst} + \lambda_{nt} L_{nt}, \quad
        L_{inst} = \sum_{steps} \frac1{\max(\#inst, 1)} \Bigl( \sum_{(i, j)\,matched} L_{match}(i, j)
        + \sum_{i\,unmatched} \mathrm{BCE}(\hat p_i, 0) \Bigr)

    Paper: arXiv:2411.15087, Sec. 3.4-3.7, Eq. (5)-(9) and (13), weights from the supplement.
    Differs from the paper: nothing that it states. Where it is silent, Mask2Former's habits: all decoder steps are supervised,
    each with its own matching; sums over queries are divided by the number of target instances. The prediction before the first
    block has no phrase loss, since it has seen neither image nor text. The merged and no-target losses are means over the batch.

    Only matched masks are built. Nothing waits for the device but the matcher's one copy. The mean loss of two micro-batches of
    equal size, each with ``num_instances`` = half of the instances of both, is the loss of the whole batch.

    Args:
        matcher: Gives the query of each target instance for all steps, as ``HungarianInstanceMatcher.match_steps`` does.
        supervision: ``"phrase"``; ``"vanilla"``: no phrase term in cost and loss; ``"none"``: no instances, only merged mask and
            no-target flag.
        weights: The weights of the losses.
        score_reduction: ``"instances"``: score losses are divided by the number of instances, like the others; ``"queries"``: mean
            over all queries of the batch; ``"m2f"``: Mask2Former's mean weighted by class, which depends on the whole batch.
        deep_supervision: Instance losses for all steps; False: for the last alone.
        merged_on_no_target: Whether samples without target take part in the merged loss; where not, they count as 0 in its mean.
        aux_merged: Makes a step's merged logits of its prediction, usually the model's aggregation: merged losses for all steps,
            summed.
        mask_loss: How masks are compared; default: on all pixels. ``MaskLoss(12544)`` is Mask2Former's way. The phrase loss is the
            attribute ``phrase_loss``, a :class:`POALoss`, and may be replaced.

    Shape:
        - ``output``: what a model returns; ``targets``: one per image, all of one size, or
          :class:`~gresbox.structures.PaddedTargets`; ``num_instances``: the normaliser, a positive number or scalar tensor;
          default: the instances of this batch, at least 1.
        - returns a dict of float32 scalars: ``merged_bce``, ``merged_dice``, ``no_target``, ``score``, ``mask_bce``, ``mask_dice``,
          ``phrase``, each weighted, and ``loss``, their sum. What a switch leaves out, or the model does not predict, has no entry.

    Raises:
        TypeError: If a target is not a GresTarget.
        ValueError: If targets differ in number, size or device from what the output asks for, or the output has no instances.

    Example:
        >>> import torch
        >>> from gresbox.structures import GresTarget
        >>> queries, tokens = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
        >>> step = InstancePrediction(torch.zeros(1, 3), queries, torch.randn(1, 4, 8, 8), queries, tokens)
        >>> output = GresOutput(torch.zeros(1, 8, 8), torch.zeros(1), step)
        >>> class FirstQueries(nn.Module):
        ...     def match_steps(self, predictions, targets, *, first_phrase_step):
        ...         return torch.arange(targets[0].masks.shape[0]).expand(len(predictions), 1, -1)
        >>> losses = InstAlignCriterion(FirstQueries())(output, [GresTarget(torch.ones(2, 32, 32, dtype=torch.bool))])
        >>> sorted(losses)
        ['loss', 'mask_bce', 'mask_dice', 'merged_bce', 'merged_dice', 'no_target', 'phrase', 'score']
    """

    def __init__(
        self,
        matcher: Any,
        *,
        supervision: str = "phrase",
        weights: InstAlignWeights | None = None,
        score_reduction: str = "instances",
        deep_supervision: bool = True,
        merged_on_no_target: bool = True,
        aux_merged: Callable[[InstancePrediction], Tensor] | None = None,
        mask_loss: MaskLoss | None = None,
    ) -> None:
        super().__init__()
        check_choice("InstAlignCriterion", "supervision", supervision, ("phrase", "vanilla", "none"))
        check_choice("InstAlignCriterion", "score_reduction", score_reduction, ("instances", "queries", "m2f"))
        self.matcher = matcher
        self.supervision = supervision
        self.weights = InstAlignWeights() if weights is None else weights
        self.score_reduction = score_reduction
        self.deep_supervision = deep_supervision
        self.merged_on_no_target = merged_on_no_target
        # In a tuple: the model's module must not become a part of the criterion, nor its parameters the criterion's.
        self._aux_merged = (aux_merged,)
        self.mask_loss = MaskLoss() if mask_loss is None else mask_loss
        self.phrase_loss = POALoss()

    def forward(self, output: GresOutput, targets: Targets, *, num_instances: float | Tensor | None = None) -> dict[str, Tensor]:
        check_targets("InstAlignCriterion", targets, output.merged)
        check_one_size("InstAlignCriterion", targets)
        losses = self._merged(output, targets)
        if output.no_target is not None:
            label = no_target_flags(targets, output.merged.device)
            loss = no_target_loss(output.no_target, label, class_weights=self.weights.no_target_classes)
            losses["no_target"] = self.weights.no_target * loss
        if self.supervision != "none":
            normaliser = instance_normaliser("InstAlignCriterion", targets, num_instances)
            losses |= {name: self.weights.instance * loss for name, loss in self._instances(output, targets, normaliser).items()}
        losses = {name: loss.float() for name, loss in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _merged(self, output: GresOutput, targets: Targets) -> dict[str, Tensor]:
        """Losses of the merged mask at the targets' size."""
        (aggregate,) = self._aux_merged
        merged = [output.merged]
        if aggregate is not None:
            merged += [aggregate(step) for step in output.aux]
        whole = merged_targets(targets)  # (B, H, W)
        size, truth = (whole.shape[1], whole.shape[2]), whole.flatten(1)
        counted: float | Tensor = 1.0 if self.merged_on_no_target else ~no_target_flags(targets, truth.device)
        bce, dice = [], []
        for logits in merged:
            values = replace(output, merged=logits).resized(size).flatten(1)
            bce.append((mask_bce(values, truth) * counted).mean())
            dice.append((mask_dice(values, truth) * counted).mean())
        weight = self.weights.merged
        return {"merged_bce": weight * torch.stack(bce).sum(), "merged_dice": weight * torch.stack(dice).sum()}

    def _instances(self, output: GresOutput, targets: Targets, normaliser: float | Tensor) -> dict[str, Tensor]:
        """Losses of score, masks and phrases, summed over the decoder steps."""
        if output.instances is None:
            raise ValueError("InstAlignCriterion: `output.instances` must be there, unless supervision='none', got None.")
        steps = (*output.aux, output.instances) if self.deep_supervision else (output.instances,)
        first = 1 if len(steps) > 1 else 0  # the prediction before the first block has no phrase term; a lone one is the last
        if self.supervision == "vanilla":
            first = len(steps)
        matches = self.matcher.match_steps(steps, targets, first_phrase_step=first)  # (S, B, M)
        matched = matches >= 0
        losses = {"score": self._scores(steps, matches, normaliser)}
        height, width = steps[0].pixels.shape[-2:]
        factor = self.mask_loss.upsample
        size = (height * factor, width * factor) if self.mask_loss.num_points is None else None
        truth, _ = stack_masks(instance_masks(targets), size)
        bce, dice = self.mask_loss(steps, truth, matches)  # (B, S, M) each
        counted = matched.transpose(0, 1)
        losses["mask_bce"] = self.weights.mask * (bce * counted).sum() / normaliser
        losses["mask_dice"] = self.weights.mask * (dice * counted).sum() / normaliser
        if self.supervision == "phrase":
            distance = self._phrases(steps[first:], matches[first:])
            losses["phrase"] = self.weights.phrase * (distance * matched[first:]).sum() / normaliser
        return losses

    def _scores(self, steps: Sequence[InstancePrediction], matches: Tensor, normaliser: float | Tensor) -> Tensor:
        """Matched queries are relevant, all others are not; summed over the steps."""
        logits = torch.stack([step.score_logits for step in steps])  # (S, B, N)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        queries = logits.shape[-1]
        relevant = logits.new_zeros((*logits.shape[:-1], queries + 1), dtype=torch.bool)  # one more place for those without a query
        relevant = relevant.scatter(-1, matches.where(matches >= 0, queries), True)[..., :queries]
        loss = F.softplus(torch.where(relevant, -logits, logits))
        if self.score_reduction == "m2f":
            unmatched = 0.1 if self.weights.unmatched is None else self.weights.unmatched
            weight = torch.where(relevant, 1.0, unmatched)
            return self.weights.score * ((loss * weight).sum((1, 2)) / weight.sum((1, 2))).sum()
        unmatched = 1.0 if self.weights.unmatched is None else self.weights.unmatched
        total = (loss * torch.where(relevant, self.weights.score, unmatched)).sum()
        return total / (normaliser if self.score_reduction == "instances" else logits[0].numel())

    def _phrases(self, steps: Sequence[InstancePrediction], matches: Tensor) -> Tensor:
        """Phrase-object alignment of the matched queries, ``(S, B, M)``; all steps are one batch."""
        queries = take_queries(torch.stack([step.queries for step in steps]), matches).flatten(0, 1)  # (S * B, M, C)
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        tokens = torch.cat([step.tokens for step in steps])
        valid = steps[0].valid
        distance = self.phrase_loss(queries, tokens, None if valid is None else valid.repeat(len(steps), 1))
        return distance.unflatten(0, matches.shape[:2])

    def extra_repr(self) -> str:
        return f"supervision={self.supervision!r}, score_reduction={self.score_reduction!r}, weights={self.weights}"
