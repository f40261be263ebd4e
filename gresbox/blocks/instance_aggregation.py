"""Adaptive instance aggregation: from instances to one merged mask."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice
from gresbox.ops import aggregate_masks, aggregate_queries
from gresbox.structures import InstancePrediction

__all__ = ["AdaptiveInstanceAggregation"]


class AdaptiveInstanceAggregation(nn.Module):
    r"""Merge all instances, each weighted by its relevance to the expression.

    .. math:: z = \sum_i \hat p_i\, \mathrm{PReLU}_a(\hat s_i) \;(+\, b),\qquad M_{merged} = \mathrm{Sigmoid}(z)

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.5, Eq. (8).
    Differs from the paper: returns the logits ``z``; a pixel belongs to the mask where ``z > 0``, strictly. As printed, zero
    scores give ``z = 0`` and many targets cancel each other's foreground; ``form="noisy_or"`` (the logit of the probability that
    at least one relevant instance covers the pixel) and ``bias`` are ours and off by default.

    Args:
        slope: Initial slope ``a`` of the PReLU for negative logits.
        num_queries: Learn one slope per query, for that many queries; None: one slope for all.
        form: ``"prelu"``, as printed; ``"noisy_or"``; ``"select"``: the union of the instances with a score above 0.5 (the paper's
            fixed selection). The last two own no slope.
        prelu: False: sum the logits as they are (the paper's ablation without PReLU).
        bias: Learn a number that is added to ``z``.

    Shape:
        - ``masks``: ``(B, N, H, W)`` logits; ``scores``: ``(B, N)`` in [0, 1]; or one
          :class:`~gresbox.structures.InstancePrediction`, whose masks are then never built.
        - returns ``(B, H, W)`` logits.

    Raises:
        ValueError: If ``form`` is unknown, or a shape does not fit.
        TypeError: If called with masks and without scores.

    Example:
        >>> import torch
        >>> aggregation = AdaptiveInstanceAggregation()
        >>> masks, scores = torch.full((1, 2, 1, 1), -4.0), torch.tensor([[1.0, 0.0]])
        >>> aggregation(masks, scores).item()
        -1.0
    """

    slope: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        slope: float = 0.25,
        num_queries: int | None = None,
        form: str = "prelu",
        prelu: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("AdaptiveInstanceAggregation", "form", form, ("prelu", "noisy_or", "select"))
        self.form = form
        has_slope = form == "prelu" and prelu
        size = () if num_queries is None else (num_queries,)
        self.register_parameter("slope", nn.Parameter(torch.full(size, float(slope))) if has_slope else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(())) if bias else None)

    @overload
    def forward(self, masks: InstancePrediction) -> Tensor: ...

    @overload
    def forward(self, masks: Tensor, scores: Tensor) -> Tensor: ...

    def forward(self, masks: Tensor | InstancePrediction, scores: Tensor | None = None) -> Tensor:
        if isinstance(masks, InstancePrediction):
            logits = masks.score_logits
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
            return aggregate_queries(masks.mask_embeddings, masks.pixels, scores, self.slope, bias=self.bias, form=self.form)
        if scores is None:
            raise TypeError("AdaptiveInstanceAggregation: `scores` must be given with mask logits, got None.")
        return aggregate_masks(masks, scores, self.slope, bias=self.bias, form=self.form)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, prelu={self.slope is not None}, bias={self.bias is not None}"
