"""Who decides "nothing": the rules that make flags for the metrics out of scores or of a classifier's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gresbox._checks import check_float, check_range, check_shape
from gresbox.metrics._inputs import check_numbers

__all__ = ["no_target_from_logits", "no_target_from_scores"]


def no_target_from_scores(scores: Tensor | Sequence[Tensor], *, threshold: float = 0.7) -> Tensor:
    """Whether the answer is "nothing": no score lies above the threshold.

    InstanceVG decides so on gRefCOCO, Ref-ZOM and R-RefCOCO, from its queries' scores at 0.7. A score that equals the threshold is
    not above it, and both are compared in the scores' own dtype, as there; :class:`gresbox.metrics.GRECMetric` keeps a box whose
    score equals its threshold.

    Args:
        scores: Each sample's scores, as a tensor or, where their numbers differ, a list.
        threshold: In the scores' unit.

    Shape:
        - ``scores``: ``(B, N)`` or B tensors ``(N_i,)``; returns ``(B,)`` bool, True where nothing is found.

    Raises:
        TypeError: If the scores are not floating-point.
        ValueError: If a score is NaN or a shape does not fit.

    Example:
        >>> import torch
        >>> no_target_from_scores(torch.tensor([[0.1, 0.9], [0.7, 0.2]]))
        tensor([False,  True])
    """
    check_range("no_target_from_scores", "threshold", threshold)
    if isinstance(scores, Tensor):
        check_shape("no_target_from_scores", scores=(scores, "B N"))
        check_numbers("no_target_from_scores", "scores", scores)
        return ~(scores > threshold).any(1)
    for index, part in enumerate(scores):
        check_shape("no_target_from_scores", **{f"scores[{index}]": (part, "N")})
        check_numbers("no_target_from_scores", f"scores[{index}]", part)
    return torch.stack([~(part > threshold).any() for part in scores]) if len(scores) else torch.zeros(0, dtype=torch.bool)


def no_target_from_logits(logits: Tensor, *, sigmoid: bool = True) -> Tensor:
    """Whether the answer is "nothing": the second of two logits is the larger one; a tie means "something".

    ReLA decides so. Its model applies a sigmoid first, and in float32 two large logits become the same 1.0: a tie that the logits
    themselves do not have.

    Args:
        logits: Of "something" and of "nothing".
        sigmoid: Compare the sigmoids in the logits' dtype, as ReLA's released model; False: the logits themselves.

    Shape:
        - ``logits``: ``(B, 2)``; returns ``(B,)`` bool, True where nothing is found.

    Raises:
        TypeError: If the logits are not floating-point.
        ValueError: If the shape does not fit.

    Example:
        >>> import torch
        >>> saturated = torch.tensor([[40.0, 60.0]])
        >>> no_target_from_logits(saturated), no_target_from_logits(saturated, sigmoid=False)
        (tensor([False]), tensor([True]))
    """
    check_shape("no_target_from_logits", logits=(logits, "B 2"))
    check_float("no_target_from_logits", logits=logits)
    values = logits.sigmoid() if sigmoid else logits
    return values[:, 1] > values[:, 0]
