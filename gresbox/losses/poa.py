"""Phrase-object alignment: each instance query must mean the phrase that it attends to."""

from __future__ import annotations

from torch import Tensor, nn

from gresbox.ops import align_phrases

__all__ = ["POALoss", "poa_loss"]


def poa_loss(
    queries: Tensor, tokens: Tensor, valid: Tensor | None = None, *, detach_relevance: bool = False, detach_tokens: bool = False
) -> Tensor:
    r"""How far each query is from the phrase it answers to.

    .. math:: R = \mathrm{softmax}(Q T^\top / \sqrt C), \quad P = R T, \quad L_i = 1 - \cos(P_i, Q_i)

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3.1, Eq. (1)-(3).
    Differs from the paper: nothing; padding is left out of the softmax.

    Args:
        queries: Instance queries of one decoder step.
        tokens: The text features of that step.
        valid: True on real tokens; None: all are real.
        detach_relevance: Let no gradient flow through the weights :math:`R`.
        detach_tokens: Let no gradient flow into the text features.

    Shape:
        - ``queries``: ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``.
        - returns ``(B, N)`` in [0, 2]; 0 where an image has no real token.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> import torch
        >>> token = torch.tensor([[[1.0, 0.0]]])
        >>> poa_loss(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), token)
        tensor([[0., 1.]])
    """
    loss, _ = align_phrases(queries, tokens, valid, detach_relevance=detach_relevance, detach_tokens=detach_tokens)
    return loss


class POALoss(nn.Module):
    r"""How far each query is from the phrase it answers to, as a module; see :func:`poa_loss`.

    .. math:: L_i = 1 - \cos(P_i, Q_i), \quad P = \mathrm{softmax}(Q T^\top / \sqrt C)\, T

    Paper: arXiv:2411.15087, Sec. 3.3.1, Eq. (1)-(3).
    Differs from the paper: nothing; by default the gradient flows through queries, tokens and weights alike.

    Args:
        detach_relevance: Let no gradient flow through the weights.
        detach_tokens: Let no gradient flow into the text features.

    Shape:
        - ``queries``: ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` True on real tokens.
        - returns ``(B, N)`` in [0, 2].

    Example:
        >>> import torch
        >>> POALoss()(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(self, *, detach_relevance: bool = False, detach_tokens: bool = False) -> None:
        super().__init__()
        self.detach_relevance = detach_relevance
        self.detach_tokens = detach_tokens

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        return poa_loss(queries, tokens, valid, detach_relevance=self.detach_relevance, detach_tokens=self.detach_tokens)

    def extra_repr(self) -> str:
        return f"detach_relevance={self.detach_relevance}, detach_tokens={self.detach_tokens}"
