"""Whether the expression refers to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice, check_shape
from gresbox.blocks.heads import MLP, mean_token

__all__ = ["NoTargetHead"]


class NoTargetHead(nn.Module):
    r"""Predict whether the expression refers to nothing in the image.

    .. math:: \hat p_{nt} = \mathrm{MLP}([\textstyle\sum_i \hat p_i Q^i ;\; \mathrm{mean}(T)])

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.6, Eq. (10)-(12).
    Differs from the paper: nothing; the sum over queries is not normalised, as printed. The perceptron's size is not printed: two
    layers, as wide as one input.

    Args:
        dim: Channels ``C`` of queries and tokens.
        inputs: ``"both"``; ``"global"``: the weighted sum of the queries alone; ``"sentence"``: the mean of the tokens alone;
            ``"mean"``: the plain mean of all queries alone (the paper's ablation).

    Shape:
        - ``queries``: ``(B, N, C)``; ``scores``: ``(B, N)`` in [0, 1]; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` True on
          real tokens.
        - returns ``(B,)`` logits; positive means "no target". A text of padding only has the mean 0.

    Raises:
        ValueError: If ``inputs`` is unknown, or a shape does not fit.

    Example:
        >>> import torch
        >>> NoTargetHead(8)(torch.randn(2, 5, 8), torch.rand(2, 5), torch.randn(2, 3, 8)).shape
        torch.Size([2])
    """

    def __init__(self, dim: int, *, inputs: str = "both") -> None:
        super().__init__()
        check_choice("NoTargetHead", "inputs", inputs, ("both", "global", "sentence", "mean"))
        self.inputs = inputs
        self.mlp = MLP(2 * dim if inputs == "both" else dim, dim, 1, num_layers=2)

    def forward(self, queries: Tensor, scores: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        named = {"queries": (queries, "B N C"), "scores": (scores, "B N"), "tokens": (tokens, "B L C")}
        if valid is not None:
            named["valid"] = (valid, "B L")
        check_shape("NoTargetHead", **named)
        parts = []
        with torch.autocast(queries.device.type, enabled=False):
            if self.inputs in ("both", "global"):
                parts.append((scores.to(_wide(scores))[:, None] @ queries.to(_wide(scores)))[:, 0])
            if self.inputs in ("both", "sentence"):
                parts.append(mean_token(tokens, valid))
            if self.inputs == "mean":
                parts.append(queries.to(_wide(queries)).mean(1))
        return self.mlp(torch.cat(parts, dim=-1).to(queries.dtype))[:, 0]

    def extra_repr(self) -> str:
        return f"inputs={self.inputs!r}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
